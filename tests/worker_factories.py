"""Factories for test_runtime.py: importable, so that a worker process can unpickle them."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from npd.errors import ModelError, RunError


class SharpModelError(ModelError):
    """A subclass that the parent does not know and that no single message builds."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Toy:
    """An object with every habit that a worker can have."""

    def __init__(self, start):
        self.total = start
        self.busy = False

    def add(self, amount):
        self.total += amount
        return self.total

    def double(self, value):
        return value + value

    def place(self):
        return os.getpid(), threading.get_ident()

    def slow_add(self, seconds, amount):
        assert not self.busy, "two calls at once"
        self.busy = True
        time.sleep(seconds)
        self.busy = False
        return self.add(amount)

    def notify(self, text):
        print(text)
        print(text, file=sys.stderr)

    def raise_model_error(self, message):
        raise ModelError(message)

    def raise_sharp_error(self):
        raise SharpModelError("one", "two")

    def raise_run_error(self, message):
        raise RunError(message)

    def raise_value_error(self, message):
        raise ValueError(message)

    def lambda_(self):
        return lambda: 1

    def environment(self, *names):
        return [os.environ.get(name) for name in names]

    def parent(self):
        return os.getppid()

    def folder(self):
        return os.getcwd()

    def torch_threads(self):
        import torch

        return torch.get_num_threads()

    def die(self, number):
        os.kill(os.getpid(), number)
        time.sleep(60)

    def exit_hard(self, code):
        os._exit(code)

    def survive_interrupt(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return "still here"


@dataclass(frozen=True)
class ToyFactory:
    start: int = 0

    def __call__(self):
        return Toy(self.start)


@dataclass(frozen=True)
class Closing:
    """An object that leaves a file when it is closed."""

    mark: Path

    def touch(self):
        return self.mark.exists()

    def close(self):
        self.mark.write_text("closed")


@dataclass(frozen=True)
class ClosingFactory:
    mark: Path

    def __call__(self):
        return Closing(self.mark)


@dataclass(frozen=True)
class BrokenFactory:
    """Fails to build until the file `cure` exists."""

    cure: Path

    def __call__(self):
        if not self.cure.exists():
            raise ModelError("model directory /nowhere does not exist: give an existing one")
        return Toy(7)
