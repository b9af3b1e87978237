"""Looking at all data before a training begins: in threads, with progress, every fault told at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from ether_diffusion.errors import InputError
from ether_diffusion.images import some

THREADS = 8  # files wait for the disk, and each may hold a large photograph
BLOCK = 1024  # calls that wait at a time: data sets can have millions of rows
QUIET_SECONDS = 2.0

Result = TypeVar("Result")


def check_all(check: Callable[[int], Result], names: Callable[[int], str], count: int) -> list[Result]:
    """What a check says of the numbers from 0 to `count`, in their order.

    Args:
        check: called in threads; raises `InputError` for what cannot be used.
        names: what to call a number in a message.
        count: of the numbers.

    Raises:
        InputError: the first that cannot be used, and the names of the others.
    """

    def outcome(number: int) -> Result | InputError:
        try:
            return check(number)
        except InputError as error:
            return error

    results: list[Result] = []
    faults: list[tuple[int, InputError]] = []
    # Other processes look at the same time, and their bars would cover each other.
    hidden = os.environ.get("RANK", "0") != "0"
    with (
        ThreadPoolExecutor(THREADS) as threads,
        tqdm(total=count, desc="checking images", delay=QUIET_SECONDS, leave=False, disable=hidden) as bar,
    ):
        try:
            for start in range(0, count, BLOCK):
                numbers = range(start, min(start + BLOCK, count))
                for number, result in zip(numbers, threads.map(outcome, numbers), strict=True):
                    if isinstance(result, InputError):
                        faults.append((number, result))
                    else:
                        results.append(result)
                    bar.update()
        except BaseException:  # Ctrl-C is not to wait for what has not begun
            threads.shutdown(cancel_futures=True)
            raise
    if faults:
        raise InputError(_all_faults([error for _, error in faults], [names(number) for number, _ in faults]))
    return results


def _all_faults(errors: Sequence[InputError], names: Sequence[str]) -> str:
    more = f"; {len(names) - 1} more cannot be used: {some(names[1:])}" if len(names) > 1 else ""
    return f"{errors[0]}{more}"
