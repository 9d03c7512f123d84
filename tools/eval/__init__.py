"""Measurements of formats and policies on a real model, through the real code path."""
