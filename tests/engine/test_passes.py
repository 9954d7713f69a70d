"""The number of passes over the images for statistics."""

from dataclasses import replace

from starseg.contract import MethodHarness


def test_two_passes_over_the_data_for_statistics() -> None:
    """One before a later step, one after every step; the published code makes four."""
    rehearsal, read = MethodHarness("star"), []
    for step in (0, 1):

        def scan(name: str, step: int = step) -> object:
            read.append((step, name))
            return iter([rehearsal.batch(step)])

        method, ctx, _ = rehearsal.enter(step, scan=scan)
        rehearsal.leave(method, replace(ctx, scan=scan))
    assert read == [(0, "after"), (1, "before"), (1, "after")]
