"""What `dsv3 generate` does: the recipe and tokenizer of a run, its weights, a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dsv3_train.checkpoint.hf.origin import FOLDER
from dsv3_train.data.tokenizer import Tokenizer, tokenizer_path
from dsv3_train.errors import UserError
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
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    as_json: bool


def run(checkpoint: Path, overrides: list[str], request: Request) -> None:
    """Print a continuation as it is drawn, or one JSON object.

    Raises:
        UserError: the run's recipe or tokenizer is missing, or the checkpoint is damaged.
    """
    recipe_file = checkpoint.parent.parent / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"{recipe_file}: missing; a checkpoint's run directory holds the recipe it was trained with")
    recipe = load(str(recipe_file), [*_ONE_PROCESS, *overrides])
    if recipe.parallel.pipeline > 1 or recipe.parallel.tensor > 1:
        raise UserError(
            "parallel: generation spreads over experts only; set parallel.expert and parallel.world_size alone"
        )
    carried = checkpoint.parent.parent / FOLDER / "tokenizer.json"  # of the files that it was converted from
    own = recipe.data.tokenizer or recipe.data.train or recipe.data.prepare or not carried.is_file()
    tokenizer = Tokenizer.load(tokenizer_path(recipe) if own else carried)
    device = distributed.device_of(recipe)
    distributed.prepare_import(device)
    launch(lambda: _on_rank(recipe, checkpoint, tokenizer, request, device), recipe.parallel.world_size, device)


def _on_rank(recipe: Recipe, checkpoint: Path, tokenizer: Tokenizer, request: Request, device: str) -> None:
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
    position = load_weights(checkpoint, [model])
    # A document begins after the end of another, as in training.
    prompt = [tokenizer.eos_id, *tokenizer.encode(request.prompt)]
    leader = torch.distributed.get_rank() == 0
    produced: list[int] = []
    printed = ""
    if leader and not request.as_json:
        print(request.prompt, end="", flush=True)
    for token in continuation(
        trained,
        prompt,
        request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stop=tokenizer.eos_id,
        device=device,
    ):
        produced.append(token)
        text = tokenizer.decode(produced)
        # Wait for the rest of a character that spans tokens.
        if leader and not request.as_json and not text.endswith("\ufffd"):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    if leader:
        text = tokenizer.decode(produced)
        report = {"checkpoint": str(checkpoint), "step": position.step, "prompt": request.prompt}
        print(json.dumps({**report, "text": text, "tokens": len(produced)}) if request.as_json else "")
    distributed.stop()
