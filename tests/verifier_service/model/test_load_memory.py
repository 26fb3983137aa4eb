"""Loading takes little more memory than what a rank holds in the end."""

from __future__ import annotations

from tests.verifier_service.model.load_memory import MB, measure, write_checkpoint

OVERHEAD = 48 * MB  # a fifth of a rank's shard here; 2 GB where a shard is 75 GB


def test_a_ranks_memory_peaks_at_its_packed_shard_and_little_more(tmp_path, capsys):
    size = write_checkpoint(tmp_path, layers=4, experts=64, packed=True)
    assert size > 380 * MB
    for rank, found in enumerate(measure(tmp_path)):
        with capsys.disabled():
            print(f"\nrank {rank}: {found.shard / MB:.0f} MB of weights, peak {found.peak / MB:.0f} MB")
        assert found.shard < 0.6 * size
        assert found.peak < found.shard + OVERHEAD
