"""A fake server as a program of its own: `fake_engine.py --model DIR --port P ...`.

Serves like vLLM and prints the flags it is given. `--do exit|die|odd|crash|wait|spawn|stay`: end at
once, by a signal, with code 255, by abort(), never serve, have a child, ignore SIGTERM (with a
child that does too); hide: ignore SIGTERM, with children in sessions of their own, one of them an
orphan; `--faults` is JSON.
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


def hidden_children() -> list[int]:
    """A child that leads a session, and a grandchild whose parent has ended."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    options = "start_new_session=True, stdout=subprocess.DEVNULL"
    code = f"import subprocess; print(subprocess.Popen({sleep}, {options}).pid)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return [subprocess.Popen(sleep, start_new_session=True).pid, int(done.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    parser.add_argument("--do", default="serve")
    parser.add_argument("--config")
    names = ["HF_TOKEN", "DB_PASSWD", "X_AUTH", "MY_CREDENTIALS", "DATABASE", "VLLM_API_KEY"]
    parser.add_argument("--show-secrets", action="store_const", const=names)
    parser.add_argument("--pids", type=Path)
    parser.add_argument("--faults", type=json.loads, default={})
    args, _ = parser.parse_known_args()
    print("FLAGS", json.dumps(sys.argv[1:]), flush=True)
    print("AUTH", importlib.util.find_spec("npd_auth") is not None, flush=True)
    if "--show-secrets" in sys.argv:
        named = {name: os.environ.get(name) for name in args.show_secrets}
        for name, value in named.items():
            print(name, value, args.config and Path(args.config).read_text(), flush=True)
    pids = [os.getpid()]
    if args.do in ("stay", "hide"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.do in ("spawn", "stay"):
        pids.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    if args.do == "hide":
        pids += hidden_children()
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
    from fake_servers import FakeVllm

    with FakeVllm(Path(args.model), port=args.port, key=args.api_key, **args.faults):
        time.sleep(600)


if __name__ == "__main__":
    main()
