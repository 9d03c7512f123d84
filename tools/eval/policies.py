"""The policies to judge, each with the one number that decides its bytes: its knob.

A policy that evicts has the knob `budget` (tokens, as a client may ask for it). Another number of
the file is declared by a comment in the policy file itself:

    # eval: knob rules.0.threshold from 2.0 to 0.1

from is the end where the policy holds the fewest bytes. A policy without a knob is what it is.
"""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import re
from typing import Any

import yaml

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "config" / "policies"
FOLDERS = [FOLDER, FOLDER / "formats"]
BUDGET = "budget"
BUDGET_MIN = 16
BUDGET_STEP = 4  # a finer budget than this moves whole pages no more
KNOB_STEPS = 256
_DECLARED = re.compile(r"(?m)^# eval: knob (\S+) from (\S+) to (\S+)\s*$")
_NAME_MAX = 40


class PolicyError(ValueError):
    """A policy file or a name that the judge cannot use."""


@dataclasses.dataclass(frozen=True)
class Knob:
    path: str  # BUDGET, or keys and list indices joined by dots
    fewest: float = 0.0  # unused for BUDGET
    most: float = 0.0

    def values(self, tokens: int) -> list[float]:
        """What may be chosen for a text of `tokens` tokens, from the fewest bytes to the most."""
        if self.path == BUDGET:
            return [float(each) for each in range(BUDGET_MIN, tokens, BUDGET_STEP)] + [tokens]
        step = (self.most - self.fewest) / KNOB_STEPS
        # Six digits: a policy file takes no number of seventeen.
        values = [float(f"{self.fewest + step * index:.6g}") for index in range(KNOB_STEPS + 1)]
        if self.fewest.is_integer() and self.most.is_integer():
            values = [float(round(value)) for value in values]
        return list(dict.fromkeys(values))


@dataclasses.dataclass(frozen=True)
class Policy:
    name: str
    text: str  # of the file
    knob: Knob | None


@dataclasses.dataclass(frozen=True)
class Run:
    """One policy at one setting."""

    policy: Policy
    value: float | None = None

    def file(self) -> tuple[str, str] | None:
        """Name and text of a policy file of this setting; None where the shipped one serves."""
        if self.policy.knob is None or self.policy.knob.path == BUDGET:
            return None
        settings = copy.deepcopy(yaml.safe_load(self.policy.text))
        _set(settings, self.policy.knob.path, self.value)
        settings["name"] = self.sequence()["policy"]
        return settings["name"], yaml.safe_dump(settings, sort_keys=False)

    def sequence(self) -> dict[str, Any]:
        """Arguments of Model.sequence."""
        knob = self.policy.knob
        if knob is None or self.value is None:
            return {"policy": self.policy.name}
        if knob.path == BUDGET:
            return {"policy": self.policy.name, "budget": int(self.value)}
        number = f"{self.value:.6g}".replace("-", "m").replace("+", "").replace(".", "-")
        return {"policy": f"{self.policy.name[:_NAME_MAX]}--{number}"}


def _steps(settings: Any, path: str) -> tuple[Any, Any]:
    """The container and the key that a path ends at. Raises PolicyError."""
    keys: list[Any] = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in keys[:-1]:
        try:
            settings = settings[key]
        except (KeyError, IndexError, TypeError):
            raise PolicyError(f"knob {path}: there is no {key!r}") from None
    try:
        settings[keys[-1]]
    except (KeyError, IndexError, TypeError):
        raise PolicyError(f"knob {path}: there is no {keys[-1]!r}") from None
    return settings, keys[-1]


def _set(settings: Any, path: str, value: float | None) -> None:
    container, key = _steps(settings, path)
    whole = isinstance(container[key], int) and value is not None and float(value).is_integer()
    container[key] = int(value) if whole and value is not None else value


def _knob(text: str, settings: dict[str, Any]) -> Knob | None:
    declared = _DECLARED.search(text)
    if declared is not None:
        path, fewest, most = declared.groups()
        try:
            knob = Knob(path, float(fewest), float(most))
        except ValueError:
            raise PolicyError(f"knob {path}: {fewest} and {most} must be numbers") from None
        _steps(settings, path)
        return knob
    evict = settings.get("evict")
    evicts = bool(settings.get("rules")) or (
        isinstance(evict, dict) and evict.get("rule", "none") != "none")
    return Knob(BUDGET) if evicts else None


def read(file: pathlib.Path) -> Policy:
    text = file.read_text(encoding="utf-8")
    try:
        settings = yaml.safe_load(text)
        if not isinstance(settings, dict) or settings.get("name") != file.stem:
            raise PolicyError("a policy's name must be that of its file")
        return Policy(file.stem, text, _knob(text, settings))
    except (yaml.YAMLError, PolicyError) as error:
        raise PolicyError(f"{file}: {error}") from None


def discover(
    names: list[str] | None = None, folders: list[pathlib.Path] | None = None
) -> list[Policy]:
    """All shipped policies, or those named, in the order of their names; each name one file."""
    files = {file.stem: file for folder in folders or FOLDERS
             for file in sorted(folder.glob("*.yaml"))}
    chosen = sorted(files) if names is None else names
    unknown = [name for name in chosen if name not in files]
    if unknown:
        raise PolicyError(f"no policy {', '.join(unknown)}; there are {', '.join(sorted(files))}")
    return [read(files[name]) for name in chosen]
