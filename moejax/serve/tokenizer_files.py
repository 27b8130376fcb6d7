"""The files of a tokenizer, carried from folder to folder."""

import shutil
from pathlib import Path

from moejax.data.tokens import bytes_as_file

TOKENIZER = "tokenizer.json"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # what describes it to others


def copy_tokenizer(name: str, folder: Path) -> None:
    """Copies the tokenizer.json of a run, and what describes it beside it, to a folder; for "bytes" one is made."""
    if name == "bytes":
        (folder / TOKENIZER).write_text(bytes_as_file(), encoding="utf-8")
        return
    file = Path(name).expanduser()
    shutil.copyfile(file, folder / TOKENIZER)
    for beside in _BESIDE:
        if (file.parent / beside).is_file():
            shutil.copyfile(file.parent / beside, folder / beside)
