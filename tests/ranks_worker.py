"""One of the processes that tests/test_ranks.py starts: does several commands one after the other, as torchrun would."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from reprune import following, together
from reprune.errors import RunError


def fails(kind: str) -> Any:
    """What the other process meets in place of loading the model."""

    def load(*_: object, **more: object) -> None:
        raise {"error": RunError("no luck"), "defect": ZeroDivisionError("a defect")}[kind]

    return load


def main() -> None:
    """The commands are a list of {name, port, arguments, environment, fails} in the file that is given."""
    load = following.load_model
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        os.environ |= {"MASTER_PORT": str(command["port"]), "LOCAL_WORLD_SIZE": "2"} | command["environment"]
        following.load_model = fails(command["fails"]) if command["fails"] else load  # type: ignore[attr-defined]
        if os.environ["RANK"] == "0":
            print(f"== {command['name']}", flush=True)
        code: Any = 0
        try:
            together.main(command["arguments"])
        except SystemExit as end:
            code = end.code
        if dist.is_initialized():
            # It failed, and the process did not end of it.
            dist.destroy_process_group()
        if os.environ["RANK"] == "0":
            print(f"== code {code}", flush=True)


main()
