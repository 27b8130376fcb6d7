"""Collectives read from the text of compiled programs, in all forms that XLA writes them in."""

import pytest

from moejax.plan.collectives import collectives

PROGRAM = """
%body.1 (arg: (s32[])) -> (s32[]) {{
  %sum = f32[8,4]{{1,0}} all-reduce(%x), {groups}, to_apply=%add
}}

ENTRY %main.2 (p: f32[8]) -> f32[8] {{
  %w = (s32[]) while(%init), condition=%condition.1, body=%body.1
  %rows = bf16[6,4]{{1,0}} all-to-all(%p), {groups}, dimensions={{0}}
}}
"""


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['data'=2,'expert'=2] {'expert'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['data'=2,'expert'=2] {'data'}", ((0, 2), (1, 3))),
    ],
    ids=["written out", "a range", "a transposed range", "the last axis", "the first axis"],
)
def test_collectives_are_read_in_all_forms(text, groups):
    reduction, exchange = collectives(PROGRAM.format(groups=text))
    assert (reduction.kind, reduction.dims, reduction.bytes, reduction.looped) == ("all-reduce", ((8, 4),), 128, True)
    assert (exchange.kind, exchange.dims, exchange.bytes, exchange.looped) == ("all-to-all", ((6, 4),), 48, False)
    assert reduction.groups == exchange.groups == groups
    far = groups == ((0, 2), (1, 3))  # devices 0 and 1 are on one node, 2 and 3 on another
    assert exchange.bytes_between((0, 0, 1, 1)) == (4 * 24 if far else 0)


def test_pairs_of_a_permute_are_read():
    line = "  %y = f8e4m3fn[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}, metadata={}"
    (permute,) = collectives(line)
    assert (permute.kind, permute.bytes, permute.groups) == ("collective-permute", 16, ((0, 1), (1, 0)))
