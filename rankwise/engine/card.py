"""The page that goes with a checkpoint, README.md."""

from pathlib import Path

from rankwise.plan import RankPlan

CARD = """---
library_name: transformers
tags: [rankwise]
---
# Compressed with rankwise

{ratio:.1%} of the parameters of the linear layers of {base} are kept{how}.{stored}

Load it after `import rankwise`, which teaches transformers this format:

```python
import rankwise
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Without that import transformers stops with a shape mismatch on `weight`; never pass `ignore_mismatched_sizes=True`
to get past it, as the layers would be filled with random numbers. `plan.json` lists what each layer became,
and `sha256sum -c SHA256SUMS` checks the files.
"""


def write_card(folder: Path, plan: RankPlan) -> None:
    """Write README.md: what was kept of which model, how it is stored, how it is opened."""
    source = (plan.provenance | plan.provenance.get("imported", {})).get("model")
    base = f"`{source}`" if source else "a model"
    how = ", as truncated factors" if any(spec.kind != "dense" for _, spec in plan) else ""
    precisions = "; ".join(sorted({str(spec.precision) for _, spec in plan}))
    stored = f" Stored as {precisions}." if plan.quantised else ""
    stored += "".join(f" `{name}` is stored as {weights}." for name, weights in plan.embeddings.items())
    text = CARD.format(ratio=plan.ratio, base=base, how=how, stored=stored)
    (folder / "README.md").write_text(text, encoding="utf-8")
