"""A model that can talk, for as long as a test needs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.first %}{{ raise_exception('users begin') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} {% endfor %}[answer]"
)


@pytest.fixture(scope="session")
def chatty(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The tiny Llama with a chat template and a context of 4096 tokens: a stream takes seconds if it is let."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(model_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
