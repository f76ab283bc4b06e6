"""A process that measures for the benchmark: `python -m mixer_jax.benchmarks.worker SIDE SETTING`.

Requests and replies are lines of JSON; what libraries print goes to standard error.
"""

import json
import os
import sys
import traceback
from typing import Any

from absl import logging

from mixer_jax.benchmarks.contestants import Contestant, Setting
from mixer_jax.benchmarks.side import Side
from mixer_jax.errors import summarize_error

# How the libraries say that memory has run out.
_OUT_OF_MEMORY = ("resource_exhausted", "out of memory", "can't allocate memory")


def main(name: str, setting: Setting, platform: str) -> None:
    """Answers requests until there are no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.set_verbosity(logging.ERROR)
    side: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            side = side or _open(name, setting, platform)
            reply = {"result": _do(side, **request)}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": summarize_error(error), "out_of_memory": is_out_of_memory(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error says that memory has run out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(said in text for said in _OUT_OF_MEMORY)


def _open(name: str, setting: Setting, platform: str) -> Side:
    if name == "jax":
        from mixer_jax.benchmarks.with_jax import JaxSide

        return JaxSide(setting)
    from mixer_jax.benchmarks.with_torch import TorchSide

    return TorchSide(setting, platform)


def _do(side: Any, do: str, **arguments: Any) -> Any:
    if "contestant" in arguments:
        arguments["contestant"] = Contestant(**arguments["contestant"])
    result = getattr(side, do)(**arguments)
    return result._asdict() if hasattr(result, "_asdict") else result


if __name__ == "__main__":
    main(sys.argv[1], Setting(**json.loads(sys.argv[2])), sys.argv[3])
