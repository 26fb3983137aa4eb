from pydantic import BaseModel

from deploy.unknown_keys import unknown_keys


class Leaf(BaseModel):
    size: int = 1


class Tree(BaseModel):
    leaf: Leaf | None = None
    leaves: list[Leaf] = []
    free: dict[str, float] = {}


def test_known_keys_pass_and_free_mappings_are_not_looked_into():
    assert unknown_keys(Tree, {"leaf": {"size": 2}, "leaves": [{"size": 3}], "free": {"anything": 1}}) == []


def test_a_key_in_a_list_is_located_by_its_index():
    assert unknown_keys(Tree, {"leaves": [{}, {"sise": 3}]}) == [
        "unknown key 'sise' in leaves[1]: did you mean 'size'?"
    ]


def test_a_key_like_no_other_is_answered_with_the_known_ones():
    assert unknown_keys(Tree, {"zzz": 1}) == ["unknown key 'zzz': known keys are free, leaf, leaves"]


def test_what_is_no_mapping_is_left_to_the_types():
    assert unknown_keys(Tree, {"leaf": 3}) == []
