"""From depth to the other hyperparameters: pure functions, chosen by name.

The swept number is the one that a method's paper calls its layers (`DEPTH_KEYS`). PRORec's Figure 6 varies the layers
of the model from 1 to 32 and does not say which; its implementation has one encoder and four decoder layers, so the
decoder's are taken, and the encoder keeps what the configuration says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from genrec_dist.config import Config
from genrec_dist.errors import ConfigError

DEPTH_KEYS = {
    "prorec": "generator.num_decoder_layers",
    "csj_id": "gpt.num_layers",
    "semantic_id": "gpt.num_layers",
    "sasrec": "sasrec.num_layers",
    "hstu": "hstu.num_layers",
}
HEAD_MULTIPLE = 8
"""Columns of an attention head are a multiple of this, as fast kernels want them."""

Rule = Callable[[str, Any, int, int], dict[str, Any]]


def fixed_width(section: str, settings: Any, base_depth: int, depth: int) -> dict[str, Any]:
    """Only the layers change: what PRORec's Figure 6 and HSTU's depth experiments show."""
    return {}


def co_scaled(section: str, settings: Any, base_depth: int, depth: int) -> dict[str, Any]:
    """Width and heads grow with depth, the learning rate falls with width; the configuration is one point of the line.

    With d0, w0, h0 and r0 of the configuration and s = depth / d0:

        heads  = max(1, round(h0 s))
        width  = w0 s, to the nearest multiple of 8 heads, at least one: a head keeps about w0 / h0 columns
        rate   = r0 sqrt(w0 / width)

    Source: Kaplan et al. 2020, section 3.1 (the loss hardly depends on width / depth while that ratio is kept within
    bounds, so one dial can set both); nanochat's `depth` (width = 64 depth, heads from the width, Adam's rate by
    width^-1/2, which goes back to the d_model^-1/2 of Vaswani et al. 2017, section 5.3). Both are about language
    models: for recommenders the exponent is an assumption. Batch, epochs, warm-up, dropout and weight decay stay.
    """
    scale = depth / base_depth
    heads = max(1, round(settings.num_heads * scale))
    step = HEAD_MULTIPLE * heads
    width = step * max(1, round(settings.dim * scale / step))
    rate = settings.optim.learning_rate * (settings.dim / width) ** 0.5
    return {
        f"{section}.dim": width,
        f"{section}.num_heads": heads,
        f"{section}.optim.learning_rate": float(f"{rate:.6g}"),
    }


RULES: dict[str, Rule] = {"fixed_width": fixed_width, "co_scaled": co_scaled}


@dataclass(frozen=True)
class Ladder:
    """The ladder of one method.

    Args:
        rule: name in `RULES`.
        method: name of the method.

    Raises:
        ConfigError: the method has no layers to sweep.
    """

    rule: str
    method: str

    def __post_init__(self) -> None:
        if self.method not in DEPTH_KEYS:
            raise ConfigError(
                "this method has no depth to sweep", where="depths", got=self.method, expected=sorted(DEPTH_KEYS)
            )

    @property
    def key(self) -> str:
        """Dotted key of the swept number."""
        return DEPTH_KEYS[self.method]

    @property
    def section(self) -> str:
        """Section of the model that is swept."""
        return self.key.split(".")[0]

    def depth_of(self, config: Config) -> int:
        """Depth of a configuration."""
        return reduce(getattr, self.key.split("."), config)  # type: ignore[arg-type, return-value]

    def settings(self, base: Config, depth: int) -> dict[str, Any]:
        """Settings of the run of this depth, by dotted key; the base's own depth gives the base, rounding aside."""
        rest = RULES[self.rule](self.section, getattr(base, self.section), self.depth_of(base), depth)
        return {self.key: depth} | rest
