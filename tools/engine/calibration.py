"""From sparsity traces to the layers and thresholds that label thoughts, or to `one class`.

arXiv 2510.01290, Algorithm 1: per prompt and layer, the density of the sparsities; layers with
exactly three modes; thresholds are the density's minima between the modes, averaged.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .modes import find_modes

LAYERS_KEPT = 4
AGREEMENT = 0.75  # share of the prompts on which a layer must show three modes


@dataclasses.dataclass(frozen=True)
class Calibration:
    """classes 3 with layers and thresholds, or classes 1 with neither."""

    classes: int
    layers: list[int]
    thresholds: list[float]  # execution < t1 <= reasoning <= t2 < transition
    mode_counts: np.ndarray  # [prompts, layers]
    note: str

    def label(self, sparsity: np.ndarray) -> str:
        """The thought of a step with these sparsities [layers]."""
        if self.classes == 1:
            return "reasoning"
        mean = float(np.mean(sparsity[self.layers]))
        if mean < self.thresholds[0]:
            return "execution"
        return "transition" if mean > self.thresholds[1] else "reasoning"


def calibrate(traces: list[np.ndarray], agreement: float = AGREEMENT) -> Calibration:
    """`traces`: one [steps, layers] array of sparsities a prompt."""
    if not traces:
        raise ValueError("calibrate: no traces")
    prompts, layers = len(traces), traces[0].shape[1]
    counts = np.zeros((prompts, layers), dtype=int)
    valleys: dict[int, list[list[float]]] = {layer: [] for layer in range(layers)}
    for prompt, trace in enumerate(traces):
        for layer in range(layers):
            found = find_modes(trace[:, layer])
            counts[prompt, layer] = len(found.peaks)
            if len(found.peaks) == 3:
                valleys[layer].append(found.valleys)
    share = (counts == 3).mean(axis=0)
    # Most prompts first; the lower layer wins a tie.
    eligible = sorted((layer for layer in range(layers) if share[layer] >= agreement),
                      key=lambda layer: (-share[layer], layer))[:LAYERS_KEPT]
    if not eligible:
        best = int(share.argmax())
        nearest = (f"the nearest, layer {best}, on {100 * share[best]:.0f} %" if share[best] > 0
                   else "none does on any")
        note = (f"One class only: a layer should show three modes on {100 * agreement:.0f} % of "
                f"{prompts} prompts; {nearest}.")
        return Calibration(1, [], [], counts, note)
    means = [np.mean(valleys[layer], axis=0) for layer in eligible]
    thresholds = [float(value) for value in np.mean(means, axis=0)]
    note = (f"Three classes: {len(eligible)} layers show three modes on at least "
            f"{100 * agreement:.0f} % of {prompts} prompts.")
    return Calibration(3, sorted(eligible), thresholds, counts, note)


def to_yaml(found: Calibration, model: str, near_zero: float, tau: int) -> str:
    """The file that a policy names under labels: {calibration: FILE}."""
    lines = [
        "# Written by tools/calibrate; a policy uses it by  labels: {calibration: FILE}.",
        f"model: {model}",
        "# Tokens between two labels.",
        f"tau: {tau}",
        "# Share of a row's maximum below which an attention weight counts as zero.",
        f"near_zero: {near_zero}",
        "# 3: execution, reasoning, transition. 1: the model shows no three modes.",
        f"classes: {found.classes}",
    ]
    if found.classes == 3:
        lines.append(f"layers: [{', '.join(str(layer) for layer in found.layers)}]")
        lines.append(f"thresholds: [{', '.join(f'{each:.4f}' for each in found.thresholds)}]")
    lines.append(f'note: "{found.note}"')
    return "\n".join(lines) + "\n"
