"""A challenger against the champion, from reading both to putting the winner in force.

What belongs here: the order of things. What does not: the checks (``ground.challengers``), the
decision and its record (``ground.promotion``), weights and lists (``models.champion``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from llmrec_assets.ground import promotion as promoting
from llmrec_assets.ground.challengers import (
    Challenger,
    Source,
    input_problems,
    read_challenger,
    read_source,
    validation_metrics,
)
from llmrec_assets.ground.champion import write_card
from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.promotion import Promotion
from llmrec_assets.ground.stages import CHALLENGER, CHAMPION
from llmrec_assets.ground.store import Store, read_manifest
from llmrec_assets.models.champion import pack_champion, validation_lists
from llmrec_assets.models.device import Device
from llmrec_assets.models.progress import Progress, silent


def challenge(
    store: Store,
    dataset: str,
    recipe_name: str,
    past: pd.DataFrame,
    *,
    stage: str | None,
    force: bool,
    run_id: str,
    code: str,
    lease: Callable[[], AbstractContextManager[Device]],
    say: Callable[[str], None],
    progress: Progress = silent,
) -> tuple[Promotion | None, list[str]]:
    """Lets a recipe's policy challenge the champion; the winner is in force afterwards.

    Killed and called again, it goes on from the answers that are finished.

    Args:
        past: ``PROMOTIONS`` so far. The caller records what is returned.
        stage: overrides the recipe's ``promotion.stage``.
        force: decides again what was decided, and replaces a champion that is damaged.
        code: version of the code that makes a champion.
        lease: gives the device once it is free.

    Returns:
        The decision, None where there was nothing to decide; and what the blocking checks found:
        with a problem the decision is a refusal.

    Raises:
        StoreError: an input is missing or damaged; so is the champion, without ``force``.
        RecipeError, DataError: see ``read_challenger``.
    """
    source = read_source(store, dataset)
    challenger = read_challenger(store, dataset, recipe_name, stage, code)
    current = store.current(CHAMPION, dataset, kind="checkpoints")
    promotion = promoting.opened(
        challenger.side,
        promoting.side_of(past, current),
        run_id,
        k=challenger.recipe.windows.top_k,
        prompts_version=challenger.prompts.version,
        ratings_version=source.ratings.version,
    )
    problems = input_problems(store, challenger, source)
    if problems:
        return promoting.refused(promotion, problems), problems
    opponent = None
    try:
        opponent = None if current is None else store.checkpoint(CHAMPION, dataset)
    except StoreError as error:
        if not force:
            raise
        say(f"{error}; the challenger takes its place without a comparison")
    if opponent is not None:
        if opponent.name.split("-")[0] == promotion.challenger:
            say(f"{opponent.name} is the champion already")
            return None, []
        told = promoting.settled(past, promotion, challenger.recipe.promotion.margin)
        if told is not None and not force:
            say(f"decided already, force decides again: {told}")
            return None, []
    trained = [] if opponent is None else read_manifest(opponent)["facts"]["trained_user_ids"]
    everybody = challenger.validation_prompts(left_out=set())
    asked = challenger.validation_prompts(left_out=set(trained))
    users_left_out = everybody["user_id"].nunique() - asked["user_id"].nunique()
    promotion = replace(promotion, users_left_out=users_left_out)
    if asked.empty:
        return promoting.without_opponent(promotion), []

    work = store.work_directory(CHAMPION, dataset, promotion.challenger)
    published = store.find_intact(CHAMPION, dataset, promotion.challenger)
    with lease() as device:
        files = published or pack_champion(challenger, work / "files")
        sides = {CHALLENGER: (files, promotion.challenger)}
        if opponent is not None:
            sides[CHAMPION] = (opponent, opponent.name)
        lists = [
            validation_lists(
                directory,
                asked,
                source,
                side=side,
                version=version,
                prompts_version=challenger.prompts.version,
                top_k=challenger.recipe.windows.top_k,
                seed=challenger.recipe.seed,
                code=code,
                work_dir=work,
                device=device,
                progress=progress,
            )
            for side, (directory, version) in sides.items()
        ]
    promotion, problems = _decided(promotion, pd.concat(lists), challenger, source)
    if promotion.in_force == promotion.challenger:
        if published is None:
            published = _publish(store, dataset, files, challenger, promotion)
        else:
            store.adopt(CHAMPION, dataset, published.name)
        promotion = replace(promotion, challenger=published.name, in_force=published.name)
    store.remove_work(work)
    return promotion, problems


def _decided(
    promotion: Promotion, lists: pd.DataFrame, challenger: Challenger, source: Source
) -> tuple[Promotion, list[str]]:
    recipe = challenger.recipe
    metrics, problems = validation_metrics(lists, challenger, source)
    if problems:
        return promoting.refused(promotion, problems), problems
    margin = recipe.promotion.margin
    return (
        promoting.judged(promotion, metrics, recipe.evaluation, margin=margin, seed=recipe.seed),
        [],
    )


def _publish(
    store: Store, dataset: str, files: Path, challenger: Challenger, promotion: Promotion
) -> Path:
    write_card(files, challenger.served, promotion)
    return store.publish_checkpoint(
        CHAMPION,
        dataset,
        promotion.challenger,
        files,
        determinants=challenger.determinants,
        facts={
            "promotion": asdict(promotion),
            "trained_user_ids": challenger.trained_user_ids,
            "run_id": promotion.run_id,
        },
    )
