"""The vLLM door: vLLM serves checkpoints of ours, dense, lowrank, pivot, `nf4` and `int4` in any mixture.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`. A checkpoint names
`rankwise` as its quantization method, and from there on `config.py` says what each of vLLM's linear layers becomes,
`layout.py` and `shares.py` which part of it this tensor-parallel rank holds, `parts.py` how its tensors are loaded, and
`method.py` how it runs: by the groups that our own runtime uses.
"""

METHOD = "rankwise"
TESTED = (0, 32)  # the minor version of vLLM that the tests run with


def register() -> None:
    """Make vLLM know `quant_method: rankwise`; harmless if called again.

    Another version of vLLM than the tested one is tried, with one warning; if its interfaces have changed, opening a
    checkpoint of ours is refused, and other models are not disturbed.
    """
    from rankwise.engine.doors.vllm.versions import register_tested

    register_tested()
