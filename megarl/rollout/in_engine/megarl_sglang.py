"""Starts an SGLang server that serves one run at a time, and whose API key is on no command line and in no log.

    MEGARL_ENGINE_KEY=… python megarl_sglang.py --model-path …      otherwise as `python -m sglang.launch_server`

SGLang takes a key only as a flag, which every user of the machine could read, and logs all its settings.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

KEY_VARIABLE = "MEGARL_ENGINE_KEY"  # empty or absent: no key is required
EXPERTS_FLAG = "--enable-return-routed-experts"
HIDDEN = "***"


def hide_in_logs(secret: str) -> None:
    """Mask `secret` in every log record of this process. SGLang's other processes log no settings."""
    make = logging.getLogRecordFactory()

    def hidden(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        try:
            text = record.getMessage()
        except Exception:  # wrong arguments: logging reports them, and prints them, when it writes the record
            text = f"{record.msg} {record.args}"
        if secret in text:
            record.msg, record.args = text.replace(secret, HIDDEN), None
        return record

    logging.setLogRecordFactory(hidden)


def prepare_with(key: str) -> None:
    """Have SGLang parse `--api-key` after its flags, and refuse a second run. The command line does not change."""
    from sglang.srt import server_args

    prepare = server_args.prepare_server_args

    def prepared(argv: Sequence[str]) -> Any:
        settings = prepare([*argv, f"--api-key={key}"] if key else argv)
        from megarl_guard import Guard  # beside this file
        from sglang.srt.entrypoints import http_server

        http_server.app.add_middleware(Guard, key="")  # SGLang itself asks for the key
        return settings

    server_args.prepare_server_args = prepared


def keep_experts_in_plain_memory() -> None:
    """SGLang keeps the experts that it reports in memory registered with CUDA, even on a machine without CUDA."""
    import torch
    from sglang.srt.mem_cache.pool_host import common

    def plain(dims: tuple[int, ...], dtype: Any, device: str, **_: Any) -> Any:
        return torch.empty(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = plain


def main() -> None:
    if key := os.environ.pop(KEY_VARIABLE, ""):
        hide_in_logs(key)
    prepare_with(key)
    runpy.run_module("sglang.launch_server", run_name="__main__")


if __name__ == "__main__":  # SGLang's other processes import this file too, by another name
    main()
elif __name__ == "__mp_main__" and EXPERTS_FLAG in sys.argv and "cpu" in sys.argv:
    keep_experts_in_plain_memory()
