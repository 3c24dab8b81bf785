"""Which staged files are merged into which published one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.pipeline.compaction import cut_merges
from gem_ray.pipeline.staging import StagedFile

MIB = 2**20
STAGED = st.lists(st.tuples(st.integers(1, 200), st.lists(st.integers(0, 30), unique=True)), max_size=12)


@given(STAGED)
def test_published_files_have_at_most_128_mib_of_staged_ones_and_every_row_once(staged: list) -> None:
    files = {
        str(number): StagedFile(str(number), mib * MIB, np.array(ids, np.int64))
        for number, (mib, ids) in enumerate(staged)
    }
    merges = cut_merges(list(files.values()), "run", "g00000")
    taken = [[files[name] for name in merge.sources] for merge in merges]
    counted = [files[n].ids[rows] for merge in merges for n, rows in zip(merge.sources, merge.rows, strict=True)]
    assert sorted(id for ids in counted for id in ids.tolist()) == sorted({id for _, ids in staged for id in ids})
    assert all(len(ids) for ids in counted)
    sizes = [[file.size for file in each] for each in taken]
    assert all(each and (len(each) == 1 or sum(each) <= 128 * MIB) for each in sizes)
    assert all(sum(each) + following[0] > 128 * MIB for each, following in pairwise(sizes))
    assert len({merge.file for merge in merges}) == len(merges)
