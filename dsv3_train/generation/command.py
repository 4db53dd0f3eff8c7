"""What `dsv3 generate` does: the recipe and tokenizer of a run, its weights, a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dsv3_train.checkpoint import tokenizer_home
from dsv3_train.checkpoint.hf import origin
from dsv3_train.data.tokenizer import Tokenizer
from dsv3_train.errors import UserError, printable
from dsv3_train.recipe.load import load
from dsv3_train.recipe.schema import NO_FP8, Recipe
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import launch

_ONE_PROCESS = [
    "parallel={world_size: 1}",
    "pipeline={}",
    *NO_FP8,
    "precision.adam_moments=fp32",
    "model.num_nextn_predict_layers=0",  # Multi-Token Prediction only serves training here
    "schedule.mtp_weight=0",
    "training.recompute=[]",
]


@dataclass(frozen=True)
class Request:
    """What to continue, how far, and how to draw."""

    prompt: str
    ids: list[int] | None
    """Token ids in place of the text; what comes of them is ids too, and no tokenizer is needed."""
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    as_json: bool


def run(checkpoint: Path, overrides: list[str], request: Request) -> None:
    """Print a continuation as it is drawn, or one JSON object.

    Raises:
        UserError: the run's recipe or tokenizer is missing or another's, an id is beyond the model's vocabulary, or the
            checkpoint is damaged.
    """
    recipe_file = checkpoint.parent.parent / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"{recipe_file}: missing; a checkpoint's run directory holds the recipe it was trained with")
    recipe = load(str(recipe_file), [*_ONE_PROCESS, *overrides])
    if recipe.parallel.pipeline > 1 or recipe.parallel.tensor > 1:
        raise UserError(
            "parallel: generation spreads over experts only; set parallel.expert and parallel.world_size alone"
        )
    task = _task(checkpoint, recipe, load(str(recipe_file)).data.tokenizer, request)
    device = distributed.device_of(recipe)
    distributed.prepare_import(device)
    launch(lambda: _on_rank(recipe, checkpoint, task, request, device), recipe.parallel.world_size, device)


@dataclass(frozen=True)
class _Task:
    """What a model is to continue, in tokens."""

    prompt: list[int]
    stops: set[int]
    tokenizer: Tokenizer | None
    """To put its answer into words; None: not known."""
    sha256: str | None


def _task(checkpoint: Path, recipe: Recipe, kept: str | None, request: Request) -> _Task:
    """The request in tokens of the run's tokenizer, or of the one that the command line names where that is not `kept`.

    Raises:
        UserError: it is another tokenizer than the run's, none is known, or an id is beyond the vocabulary.
    """
    run_dir = checkpoint.parent.parent
    home = tokenizer_home.find(run_dir, recipe)
    if home and recipe.data.tokenizer != kept:
        tokenizer_home.refuse_named(home, recipe)
    sha256 = home.sha256 if home else None
    tokenizer = home.tokenizer if home and sha256 else None
    stops = home.stops if home else set()
    if request.ids is not None:
        prompt = request.ids
    elif home is None:
        raise UserError(f"{run_dir}: no tokenizer is known; set data.tokenizer to a tokenizer.json, or give --ids")
    else:
        tokenizer = home.tokenizer
        # A document begins as in training: published models' with a token for it, in our data after another's end.
        begin = tokenizer.special("bos") if origin.find(checkpoint) else tokenizer.eos_id
        prompt = [begin, *tokenizer.encode(request.prompt)]
    if beyond := [number for number in prompt if not 0 <= number < recipe.model.vocab_size]:
        name = "--ids" if tokenizer is None or request.ids else tokenizer.name
        raise UserError(
            f"{name}: {beyond[0]} is no token of this model, whose vocabulary is {recipe.model.vocab_size}; "
            "give ids or a tokenizer.json that fit it"
        )
    return _Task(prompt, stops, tokenizer, sha256)


def _on_rank(recipe: Recipe, checkpoint: Path, task: _Task, request: Request, device: str) -> None:
    import torch

    from dsv3_train.checkpoint.load import load_weights
    from dsv3_train.generation.sample import continuation
    from dsv3_train.model.build import build_chunks, in_training_precision
    from dsv3_train.model.config import megatron_config

    distributed.start(recipe, device)
    config = megatron_config(recipe, device, inference=True)
    model = build_chunks(recipe, config)[0].to(device)
    # Before weights are loaded: it takes the routing biases to BF16 as it finds them.
    trained = in_training_precision(model, config).eval()
    position = load_weights(checkpoint, [model], tokenizer=task.sha256)
    leader = torch.distributed.get_rank() == 0
    produced: list[int] = []
    printed = ""
    text: str | None = None
    if leader and not request.as_json and request.ids is None:
        print(printable(request.prompt), end="", flush=True)
    for token in continuation(
        trained,
        task.prompt,
        request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stops=task.stops,
        device=device,
    ):
        produced.append(token)
        text = task.tokenizer.decode(produced) if task.tokenizer else None
        if not leader or request.as_json:
            continue
        if request.ids is not None:
            print(token, end=" ", flush=True)
        elif text is not None and not text.endswith("\ufffd"):  # a character that spans tokens waits for its rest
            print(printable(text[len(printed) :]), end="", flush=True)
            printed = text
    if leader:
        report = {"checkpoint": str(checkpoint), "step": position.step, "prompt": request.prompt, "text": text or ""}
        if request.ids is not None:
            report |= {"prompt": request.ids, "text": text, "ids": produced}
        print(json.dumps({**report, "tokens": len(produced)}) if request.as_json else "")
    distributed.stop()
