"""Which stages of the model a pipeline rank holds under each schedule."""

from __future__ import annotations

V_SHAPED = ("zbv", "dualpipev")
"""Two stages a rank, one on each leg of a V."""
MIRRORED = (*V_SHAPED, "dualpipe")
"""A rank's second chunk is what Megatron-core would build on the rank opposite; first and last stage share a rank."""
PAIRING = ("dualpipe", "dualpipev", "interleaved")
"""They can run a forward and a backward pass as one operation."""
SCHEDULED = ("zb1p", *MIRRORED)
"""Run from our lists of operations (pipeline/); they take gradients of weights apart. Megatron-core runs the others."""


def stage_count(kind: str, ranks: int, virtual: int = 1) -> int:
    """Stages that a schedule cuts the model into; `virtual` counts chunks per rank of the interleaved one."""
    if kind == "interleaved":
        return ranks * virtual
    return ranks * (2 if kind in V_SHAPED else 1)


def chunks_of(kind: str, ranks: int, rank: int, virtual: int = 1) -> list[tuple[int, int]]:
    """(direction, stage) of each model chunk of a pipeline rank, by stage: the order of the model list.

    The V-shaped schedules and dualpipe give a rank two chunks. Direction 1 of dualpipe enters the pipeline at its last
    rank: rank r holds stage r for one direction and stage P-1-r for the other (report, section 3.2.1). In order of
    stages, the two ranks that hold the same stages list them alike, as their gradient reductions need.
    """
    if kind == "interleaved":
        return [(0, chunk * ranks + rank) for chunk in range(virtual)]
    if kind in V_SHAPED:
        return [(0, rank), (0, 2 * ranks - 1 - rank)]
    if kind == "dualpipe":
        return sorted([(0, rank), (1, ranks - 1 - rank)], key=lambda chunk: chunk[1])
    return [(0, rank)]
