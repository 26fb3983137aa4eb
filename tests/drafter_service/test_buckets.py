"""Sizes of draft forwards."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from drafter_service.buckets import Bucket, Buckets


@given(st.integers(1, 20), st.integers(2, 17), st.data())
def test_a_bucket_holds_its_batch_and_no_smaller_one_of_as_many_blocks_does(most: int, block_size: int, data):
    sizes = data.draw(st.lists(st.integers(2, block_size), min_size=1, max_size=most))
    buckets, count, rows = Buckets(most, block_size), len(sizes), sum(sizes)

    def holds(bucket: Bucket) -> bool:
        return bucket.blocks >= count and bucket.rows >= rows and bucket.asked >= rows - count

    chosen = buckets.choose(count, rows)
    assert holds(chosen)
    assert chosen in list(buckets)
    assert chosen == min(filter(holds, buckets), key=lambda bucket: (bucket.blocks, bucket.rows))


def test_buckets_are_powers_of_two_and_the_largest_sizes():
    made = list(Buckets(5, 6))
    assert sorted({bucket.blocks for bucket in made}) == [1, 2, 4, 5]
    assert [bucket for bucket in made if bucket.blocks == 2] == [Bucket(2, 12, 10), Bucket(2, 8, 6), Bucket(2, 4, 2)]
    assert made[0] == Bucket(5, 30, 25)


def test_a_batch_of_more_blocks_than_any_bucket_gets_one_to_measure():
    assert Buckets(4, 6).choose(5, 17) == Bucket(5, 17, 12)
