"""A fake server as a program of its own: `fake_engine.py --model DIR --port P ...`.

Serves like the engine whose flags it is given (`--model` is vLLM's, `--model-path` SGLang's) and
prints them. `--do exit|die|odd|crash|wait|spawn|stay`: end at once, by a signal, with code 255, by
abort(), never serve, have a child, ignore SIGTERM (with a child that does too); `--faults` is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--model-path")
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    parser.add_argument("--do", default="serve")
    parser.add_argument("--pids", type=Path)
    parser.add_argument("--faults", type=json.loads, default={})
    args, _ = parser.parse_known_args()
    print("FLAGS", json.dumps(sys.argv[1:]), flush=True)
    print("GUARD", importlib.util.find_spec("npd_guard") is not None, flush=True)
    pids = [os.getpid()]
    if args.do == "stay":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.do in ("spawn", "stay"):
        pids.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    if args.pids:
        args.pids.write_text(json.dumps(pids))
    if args.do == "exit":
        print("(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:1] ValueError: no room for it")
        print("and a last line that says nothing", flush=True)
        sys.exit(3)
    if args.do in ("odd", "crash"):
        sys.exit(255) if args.do == "odd" else os.abort()
    if args.do == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if args.do == "wait":
        time.sleep(600)
    from fake_servers import FakeSglang, FakeVllm

    kind = FakeVllm if args.model else FakeSglang
    directory = Path(args.model or args.model_path)
    with kind(directory, port=args.port, key=args.api_key, **args.faults):
        time.sleep(600)


if __name__ == "__main__":
    main()
