"""Group ``prompts``: from ratings to what the model is asked and should answer."""

import dagster as dg

from llmrec_assets.ground import leaks
from llmrec_assets.orchestration.assets.common import table_options
from llmrec_assets.orchestration.config import RunConfig
from llmrec_assets.orchestration.partitions import recipe_of, run_partitions
from llmrec_assets.orchestration.results import CheckedResult, Frame, checked_table_result

GROUP = "prompts"


@dg.asset(
    **table_options("user_splits", GROUP),
    partitions_def=run_partitions,
    check_specs=[
        dg.AssetCheckSpec(
            "no_user_in_two_splits",
            asset="user_splits",
            blocking=True,
            description="Every user stands once, in one of train, validation and test.",
        )
    ],
)
def user_splits(
    context: dg.AssetExecutionContext, config: RunConfig, users: Frame
) -> CheckedResult:
    """70/15/15 by user through a seeded stable hash: a new user never moves an old one."""
    from llmrec_assets.ground.splits import split_users

    recipe = recipe_of(context)
    frame = split_users(users["user_id"], recipe.splits, config.seed_of(recipe))
    yield from checked_table_result(
        "user_splits",
        frame,
        {"no_user_in_two_splits": leaks.user_split_problems(frame)},
        {f"users_{name}": int(count) for name, count in frame["split"].value_counts().items()},
    )


@dg.asset(
    **table_options("catalogue", GROUP),
    partitions_def=run_partitions,
    check_specs=[
        dg.AssetCheckSpec(
            "titles_are_as_the_recipe_says",
            asset="catalogue",
            blocking=True,
            description="The films of `movies` under their real titles; or under invented ones, "
            "one to one, of the same year, with no real title inside.",
        )
    ],
)
def catalogue(context: dg.AssetExecutionContext, movies: Frame) -> CheckedResult:
    """Films under the titles that models read and write: the real ones, or invented ones."""
    from llmrec_assets.ground.catalogue import catalogue_problems, shown_catalogue

    recipe = recipe_of(context)
    # The recipe's own seed: a seed override redraws users and windows, not the films' names.
    frame = shown_catalogue(movies, recipe.prompts, recipe.seed)
    yield from checked_table_result(
        "catalogue",
        frame,
        {"titles_are_as_the_recipe_says": catalogue_problems(frame, movies, recipe.prompts)},
        {"titles": recipe.prompts.titles},
    )


@dg.asset(
    **table_options("interaction_windows", GROUP),
    partitions_def=run_partitions,
    check_specs=[
        dg.AssetCheckSpec(
            "no_leak",
            asset="interaction_windows",
            blocking=True,
            description="Nothing after the cut-off in the context or the seen set, nothing at or "
            "before it in the ground truth, ground truth disjoint from the history, cut-off valid; "
            "protocol temporal: training windows end by the global time, the others start there.",
        )
    ],
)
def interaction_windows(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    ratings: Frame,
    movies: Frame,
    user_splits: Frame,
) -> CheckedResult:
    """Per user: a drawn valid cut-off, the last films up to it and the next liked (paper §3.2)."""
    from llmrec_assets.ground.splits import temporal_split_time
    from llmrec_assets.ground.windows import interaction_windows as draw_windows

    recipe = recipe_of(context)
    canonical = movies[["movie_id", "canonical_movie_id"]]
    frame = draw_windows(
        ratings, user_splits, recipe.windows, config.seed_of(recipe), canonical=canonical
    )
    split_time = temporal_split_time(ratings, recipe.windows)
    yield from checked_table_result(
        "interaction_windows",
        frame,
        {"no_leak": leaks.window_problems(frame, ratings, user_splits, canonical, recipe.windows)},
        {
            "users_with_a_window": int(frame["user_id"].nunique()),
            "users_without": int(user_splits["user_id"].nunique() - frame["user_id"].nunique()),
            **{f"windows_{n}": int(c) for n, c in frame["split"].value_counts().items()},
            "protocol": recipe.windows.protocol,
            "split_time": "none"
            if split_time is None
            else dg.MetadataValue.timestamp(float(split_time)),
        },
    )


@dg.asset(
    **table_options("prompts", GROUP),
    partitions_def=run_partitions,
    check_specs=[
        dg.AssetCheckSpec(
            "prompts_show_their_windows_only",
            asset="prompts",
            blocking=True,
            description="Context and ground truth are the window's; no ground-truth title stands "
            "in the prompt.",
        ),
        dg.AssetCheckSpec(
            "no_real_title_in_anonymised_prompts",
            asset="prompts",
            blocking=True,
            description="With `titles: invented`, no real title stands in a prompt or completion; "
            "with real titles it passes.",
        ),
    ],
)
def prompts(
    context: dg.AssetExecutionContext,
    interaction_windows: Frame,
    users: Frame,
    movies: Frame,
    catalogue: Frame,
) -> CheckedResult:
    """The user message per window, and the completion SFT learns (paper Figure 2)."""
    from llmrec_assets.ground.catalogue import real_title_problems
    from llmrec_assets.ground.prompts import render_prompts

    recipe = recipe_of(context)
    frame = render_prompts(interaction_windows, users, catalogue, recipe.prompts, recipe.windows)
    problems = leaks.prompt_problems(frame, interaction_windows, catalogue)
    shown = real_title_problems(frame, movies, users, recipe.prompts)
    example = frame.iloc[0] if len(frame) else None
    yield from checked_table_result(
        "prompts",
        frame,
        {
            "prompts_show_their_windows_only": problems,
            "no_real_title_in_anonymised_prompts": shown,
        },
        {
            "template": recipe.prompts.template,
            "example": "none"
            if example is None
            else dg.MetadataValue.md(
                f"~~~text\n{example['prompt']}\n\n{example['completion']}\n~~~"
            ),
        },
    )
