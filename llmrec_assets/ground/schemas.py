"""The declared schema of every table asset: columns by name, never by position.

What belongs here: column names, types and one-line meanings. What does not: how a table is
computed (its own module) or stored (``store``). ``dataset`` and ``recipe`` are no columns of the
stored tables: they are the partition, and the warehouse's views add them.
"""

from __future__ import annotations

import pyarrow as pa

_IDS = pa.list_(pa.int32())


def _schema(*columns: tuple[str, pa.DataType, bool, str]) -> pa.Schema:
    """Builds a schema from (name, type, nullable, meaning)."""
    return pa.schema(
        [
            pa.field(name, type_, nullable=nullable, metadata={"description": meaning})
            for name, type_, nullable, meaning in columns
        ]
    )


RATINGS = _schema(
    ("user_id", pa.int32(), False, "user id of the source"),
    ("movie_id", pa.int32(), False, "movie id of the source"),
    ("rating", pa.int8(), False, "1 to 5 stars"),
    ("timestamp", pa.int64(), False, "when it was rated, Unix seconds UTC"),
)

MOVIES = _schema(
    ("movie_id", pa.int32(), False, "movie id of the source"),
    ("title", pa.string(), False, "title as in the source, with its year"),
    ("year", pa.int16(), True, "year in the title's last parentheses"),
    ("release_date", pa.date32(), True, "release date where the source has one"),
    ("genres", pa.list_(pa.string()), False, "genres in the source's order"),
    (
        "canonical_movie_id",
        pa.int32(),
        False,
        "smallest id that carries this title: titles under two ids count as one film",
    ),
)

#: The columns of ``MOVIES``, so that whatever reads films reads either.
CATALOGUE = _schema(
    *(
        (
            field.name,
            field.type,
            field.nullable,
            "title shown to models: the real one, or the invented one that stands for it"
            if field.name == "title"
            else field.metadata[b"description"].decode(),
        )
        for field in MOVIES
    )
)

USERS = _schema(
    ("user_id", pa.int32(), False, "user id of the source"),
    ("age", pa.int16(), True, "age in years (ML-100K format)"),
    ("age_band", pa.string(), True, "age band, e.g. '25-34' (ML-1M format)"),
    ("gender", pa.string(), False, "'M' or 'F', as in the source"),
    ("occupation", pa.string(), False, "occupation, decoded"),
    ("zip_code", pa.string(), False, "ZIP code as written; some hold letters"),
    ("city", pa.string(), True, "city of the ZIP code; NULL when unknown or foreign"),
    ("state", pa.string(), True, "two-letter state of the ZIP code; NULL likewise"),
)

_CHECKPOINT = (
    "checkpoint_version",
    pa.string(),
    True,
    "version of the checkpoint that answered; NULL: a classical recommender",
)
_ANSWERED = (
    "answer_version",
    pa.string(),
    True,
    "hash of how it was decoded and grounded, or of the recipe's baselines",
)

USER_SPLITS = _schema(
    ("user_id", pa.int32(), False, "user"),
    ("split", pa.string(), False, "'train', 'validation' or 'test'"),
)

_WINDOW_KEY = (
    ("user_id", pa.int32(), False, "user"),
    ("window_index", pa.int16(), False, "0, 1, … within the user, by cut-off time"),
)

INTERACTION_WINDOWS = _schema(
    *_WINDOW_KEY,
    ("split", pa.string(), False, "the user's split"),
    ("cutoff_timestamp", pa.int64(), False, "time of the last context interaction, Unix seconds"),
    ("n_history", pa.int32(), False, "interactions at or before the cut-off (the seen set)"),
    ("n_valid_cutoffs", pa.int32(), False, "valid cut-offs of this user"),
    ("context_movie_ids", _IDS, False, "last window_size films up to the cut-off, oldest first"),
    ("context_ratings", pa.list_(pa.int8()), False, "their ratings, same order"),
    ("ground_truth_movie_ids", _IDS, False, "next top_k liked films after the cut-off, in order"),
)

PROMPTS = _schema(
    *_WINDOW_KEY,
    ("split", pa.string(), False, "the user's split"),
    ("template", pa.string(), False, "prompt template"),
    ("cutoff_timestamp", pa.int64(), False, "the window's cut-off, Unix seconds"),
    ("prompt", pa.string(), False, "user message given to the model"),
    ("completion", pa.string(), False, "the answer SFT trains: the ground truth, rendered"),
    ("context_movie_ids", _IDS, False, "films of the window's context, oldest first"),
    ("ground_truth_movie_ids", _IDS, False, "next top_k liked films after the cut-off, in order"),
)

RESPONSES = _schema(
    *_WINDOW_KEY,
    ("stage", pa.string(), False, "model stage that answered: 'base', 'sft', …"),
    (
        "decoding",
        pa.string(),
        False,
        "'free' text, a 'constrained' list, the 'ranked' titles, or those of EASE's films "
        "('ranked-ease', a hybrid), rendered",
    ),
    ("response", pa.string(), False, "raw text, as generated"),
    ("n_prompt_tokens", pa.int32(), False, "tokens of the rendered prompt"),
    (
        "n_response_tokens",
        pa.int32(),
        False,
        "tokens generated, end of text not counted; ranked: tokens of titles read",
    ),
    ("finished", pa.bool_(), False, "ended by itself rather than by max_new_tokens"),
    ("checkpoint_version", pa.string(), False, "version of the checkpoint that answered"),
    ("prompts_version", pa.string(), False, "version of the prompts it answered"),
    ("answer_version", pa.string(), False, "hash of how it was decoded"),
)

SAMPLED_RESPONSES = _schema(
    *_WINDOW_KEY,
    ("split", pa.string(), False, "the user's split: 'train' or 'validation'"),
    ("sample", pa.int16(), False, "0 … n - 1; texts of a prompt are distinct, so some may lack"),
    ("draw", pa.int16(), False, "which draw gave the text, 0 first; more: repeats were drawn"),
    ("response", pa.string(), False, "raw text, as sampled"),
    ("n_prompt_tokens", pa.int32(), False, "tokens of the rendered prompt"),
    ("n_response_tokens", pa.int32(), False, "tokens sampled, end of text not counted"),
    ("finished", pa.bool_(), False, "ended by itself rather than by max_new_tokens"),
    ("checkpoint_version", pa.string(), False, "version of the SFT checkpoint that answered"),
    ("prompts_version", pa.string(), False, "version of the prompts it answered"),
    ("sampling_version", pa.string(), False, "hash of all that determines these samples"),
)

PREFERENCE_PAIRS = _schema(
    *_WINDOW_KEY,
    ("split", pa.string(), False, "'train' pairs train, 'validation' pairs validate"),
    ("pair", pa.int16(), False, "0, 1, … within the window"),
    ("origin", pa.string(), False, "'sampled', or 'ground truth' (chosen; beyond the paper)"),
    ("chosen", pa.string(), False, "response with the higher NDCG@k"),
    ("rejected", pa.string(), False, "response with the lower NDCG@k"),
    ("chosen_score", pa.float64(), False, "its NDCG@k in [0, 1]"),
    ("rejected_score", pa.float64(), False, "its NDCG@k in [0, 1]"),
    ("chosen_sample", pa.int16(), True, "sample number; NULL: the ground truth"),
    ("rejected_sample", pa.int16(), False, "sample number"),
    ("checkpoint_version", pa.string(), False, "version of the SFT checkpoint that answered"),
    ("prompts_version", pa.string(), False, "version of the prompts answered"),
    ("sampling_version", pa.string(), False, "`sampling_version` of the samples"),
)

RECOMMENDATIONS = _schema(
    *_WINDOW_KEY,
    ("stage", pa.string(), False, "model stage or classical recommender"),
    (
        "decoding",
        pa.string(),
        False,
        "the response's; 'ranking': classical; 'ranking-shown': it hides only what is shown",
    ),
    ("information_set", pa.string(), False, "what the recommender saw: 'prompt' or 'history'"),
    ("rank", pa.int16(), False, "slot 1 … top_k; every window has exactly top_k slots"),
    ("text", pa.string(), True, "the item as parsed from the response; NULL: nothing there"),
    ("movie_id", pa.int32(), True, "canonical movie id; NULL when refused or nothing there"),
    (
        "grounding",
        pa.string(),
        False,
        "'exact', 'normalised', 'similar', 'refused', 'missing' (empty slot) or 'id' (classical)",
    ),
    ("similarity", pa.float32(), True, "0 to 100, the similarity the match was accepted at"),
    ("is_duplicate", pa.bool_(), False, "the film already stands at a better rank"),
    ("is_seen", pa.bool_(), False, "the user had rated the film by the cut-off"),
    ("prompts_version", pa.string(), False, "version of the prompts answered"),
    _CHECKPOINT,
    _ANSWERED,
)

USER_METRICS = _schema(
    *_WINDOW_KEY,
    ("protocol", pa.string(), False, "evaluation protocol: 'user-split' or 'temporal'"),
    ("stage", pa.string(), False, "model stage or classical recommender"),
    ("decoding", pa.string(), False, "how the list was made"),
    ("information_set", pa.string(), False, "what the recommender saw"),
    ("ndcg", pa.float64(), False, "NDCG@k in [0, 1]"),
    ("precision", pa.float64(), False, "Precision@k in [0, 1]"),
    ("recall", pa.float64(), False, "Recall@k in [0, 1]"),
    ("hits", pa.int16(), False, "slots that hit the ground truth"),
    ("n_ground_truth", pa.int16(), False, "films in the ground truth"),
    ("n_parsed", pa.int16(), False, "slots with a parsed item"),
    ("n_in_catalogue", pa.int16(), False, "slots grounded to a film"),
    ("n_duplicate", pa.int16(), False, "slots that repeat a film"),
    ("n_seen", pa.int16(), False, "slots with a film already seen"),
    ("prompts_version", pa.string(), False, "version of the prompts answered"),
    ("recommendations_version", pa.string(), False, "version of the recommendations scored"),
    _CHECKPOINT,
    _ANSWERED,
)


def _interval(name: str, meaning: str, *, nullable: bool = False) -> list[tuple]:
    return [
        (name, pa.float64(), nullable, meaning),
        (f"{name}_low", pa.float64(), nullable, f"{meaning}: lower end of the interval"),
        (f"{name}_high", pa.float64(), nullable, f"{meaning}: upper end of the interval"),
    ]


METRIC_TABLE = _schema(
    ("protocol", pa.string(), False, "evaluation protocol"),
    ("stage", pa.string(), False, "model stage or classical recommender"),
    ("decoding", pa.string(), False, "how the list was made"),
    ("information_set", pa.string(), False, "what the recommender saw"),
    ("k", pa.int16(), False, "list length"),
    ("n_users", pa.int32(), False, "test users"),
    ("n_windows", pa.int32(), False, "test windows"),
    ("hits", pa.int32(), False, "slots that hit, summed over windows"),
    *_interval("ndcg", "mean NDCG@k"),
    *_interval("precision", "mean Precision@k"),
    *_interval("recall", "mean Recall@k"),
    ("versus", pa.string(), True, "stage of the paired difference; NULL: none"),
    *_interval("ndcg_difference", "mean paired NDCG@k difference to `versus`", nullable=True),
    ("ndcg_difference_p", pa.float64(), True, "its sign-flip p-value over users, two-sided"),
    (
        "ndcg_difference_p_holm",
        pa.float64(),
        True,
        "that p-value after Holm's correction over all of `comparisons`",
    ),
    ("parsable", pa.float64(), False, "share of slots with a parsed item"),
    ("in_catalogue", pa.float64(), False, "share of slots grounded to a film"),
    ("duplicate", pa.float64(), False, "share of slots that repeat a film"),
    ("seen", pa.float64(), False, "share of slots with a film already seen"),
    ("prompts_version", pa.string(), False, "version of the prompts all rows answered"),
    ("recommendations_version", pa.string(), False, "version of the recommendations scored"),
    _CHECKPOINT,
    _ANSWERED,
)

_ROW = (
    ("protocol", pa.string(), False, "evaluation protocol"),
    ("stage", pa.string(), False, "model stage or classical recommender"),
    ("decoding", pa.string(), False, "how the list was made"),
    ("information_set", pa.string(), False, "what the recommender saw"),
)

_SCORED = ("user_metrics_version", pa.string(), False, "version of the metrics it was made from")

COMPARISONS = _schema(
    _ROW[0],
    (
        "reason",
        pa.string(),
        False,
        "'predecessor', 'free decoding', 'proposer', 'best classical' or 'popularity'",
    ),
    *_ROW[1:],
    ("versus_stage", pa.string(), False, "stage of the row it is compared to"),
    ("versus_decoding", pa.string(), False, "decoding of that row"),
    ("versus_information_set", pa.string(), False, "information set of that row"),
    ("n_users", pa.int32(), False, "test users, all of them paired"),
    ("n_differ", pa.int32(), False, "users whose two scores differ"),
    *_interval("difference", "mean paired NDCG@k difference"),
    ("deviation", pa.float64(), False, "standard deviation of a user's difference"),
    ("p", pa.float64(), False, "sign-flip p-value over users, two-sided"),
    ("p_holm", pa.float64(), False, "p after Holm's correction over all pairs of this table"),
    ("n_comparisons", pa.int32(), False, "pairs that the correction is over"),
    ("is_shown", pa.bool_(), False, "p_holm is at most 1 - confidence: more than chance"),
    (
        "users_needed",
        pa.int32(),
        True,
        "users to see a difference of this size with 80 % power; NULL: there is none to see",
    ),
    _SCORED,
)

BEYOND_ACCURACY = _schema(
    *_ROW,
    ("k", pa.int16(), False, "list length"),
    ("n_windows", pa.int32(), False, "test windows"),
    ("valid", pa.float64(), False, "share of slots with a film, neither repeated nor seen"),
    ("n_films", pa.int32(), False, "different films among the valid slots"),
    ("coverage", pa.float64(), False, "n_films over the films of the catalogue"),
    (
        "novelty",
        pa.float64(),
        True,
        "mean self-information of a valid slot's film in bits, by the training users who rated it",
    ),
    ("popularity", pa.float64(), True, "mean percentile of that popularity in the catalogue, 0-1"),
    ("diversity", pa.float64(), True, "mean Jaccard distance of the genres within a list, 0-1"),
    (
        "miscalibration",
        pa.float64(),
        True,
        "Jensen-Shannon divergence of the list's genres from those the user liked, 0-1",
    ),
    ("prompt_tokens", pa.float64(), True, "tokens read per user; NULL: no language model"),
    (
        "response_tokens",
        pa.float64(),
        True,
        "tokens generated (ranked: read) per user; NULL: likewise",
    ),
    ("recommendations_version", pa.string(), False, "version of the recommendations described"),
)

GROUP_METRICS = _schema(
    *_ROW,
    (
        "grouping",
        pa.string(),
        False,
        "'age', 'gender', 'activity' or 'ground truth popularity'",
    ),
    ("group", pa.string(), False, "the group's name"),
    ("position", pa.int16(), False, "the group's place within its grouping, 0 first"),
    ("n_users", pa.int32(), False, "test users of the group"),
    ("hits", pa.int32(), False, "slots that hit, summed over their windows"),
    *_interval("ndcg", "mean NDCG@k of the group"),
    ("users_left_out", pa.int32(), False, "test users of this grouping in groups too small"),
    _SCORED,
)

SAMPLE_RECOMMENDATIONS = _schema(
    *_WINDOW_KEY,
    ("row", pa.string(), False, "'liked', 'disliked', 'ground truth' or a stage"),
    ("rank", pa.int16(), False, "position, 1 first"),
    ("text", pa.string(), True, "title, or the item as the model wrote it"),
    ("title", pa.string(), True, "title it was grounded to"),
    ("is_hit", pa.bool_(), False, "it is in the ground truth and counts"),
)

MEMORISATION = _schema(
    ("task", pa.string(), False, "'next title', 'title of id' or 'next rating'"),
    (
        "condition",
        pa.string(),
        False,
        "'source': rows as in the files; 'control': the same places under other ids",
    ),
    ("answered_by", pa.string(), False, "'model', or 'baseline': what guessing gets"),
    (
        "match",
        pa.string(),
        False,
        "what counts: 'exact' or 'normalised' title; whole 'row', its 'movie_id', its 'rating'",
    ),
    ("n", pa.int32(), False, "questions"),
    ("hits", pa.int32(), False, "questions answered so"),
    ("share", pa.float64(), False, "hits / n"),
    ("low", pa.float64(), False, "lower end of the exact binomial interval"),
    ("high", pa.float64(), False, "upper end of the exact binomial interval"),
    ("checkpoint_version", pa.string(), False, "version of the base model that was asked"),
)

LEAVE_LAST_OUT = _schema(
    ("recommender", pa.string(), False, "'popularity', 'itemknn' or 'ease'"),
    (
        "setting",
        pa.string(),
        False,
        "hyperparameters, chosen on the last film but one among those of the recipe; '': none",
    ),
    ("k", pa.int16(), False, "list length"),
    ("n_users", pa.int32(), False, "users with enough films, one target each"),
    ("n_items", pa.int32(), False, "films ranked, less those the user has met"),
    *_interval("hr", "share of users whose last film is among the first k"),
    *_interval("ndcg", "mean NDCG@k of the last film"),
)

PROMOTIONS = _schema(
    ("decided_at", pa.string(), False, "when, ISO 8601, UTC"),
    (
        "decision",
        pa.string(),
        False,
        "'first', 'promoted', 'kept', 'refused' (a blocking check failed) or 'rolled back'",
    ),
    ("reason", pa.string(), False, "why, in a sentence"),
    (
        "challenger",
        pa.string(),
        False,
        "version that challenged; rolled back: the one taken back; an attempt at a version of "
        "`champion`, published only where it won",
    ),
    ("challenger_recipe", pa.string(), False, "its recipe"),
    ("challenger_stage", pa.string(), False, "its stage: 'sft', 'dpo' or 'rlhf'"),
    ("challenger_decoding", pa.string(), False, "how it answers and serves"),
    ("champion", pa.string(), True, "version in force before; NULL: there was none"),
    ("champion_recipe", pa.string(), True, "its recipe"),
    ("champion_stage", pa.string(), True, "its stage"),
    ("champion_decoding", pa.string(), True, "how it answers and serves"),
    ("in_force", pa.string(), True, "version in force afterwards; NULL: still none"),
    ("loser", pa.string(), True, "which of the two is not in force; NULL: there is none"),
    ("k", pa.int16(), True, "list length; NULL: nothing was measured, as all that follows"),
    ("n_users", pa.int32(), True, "validation users answered, by both where there are two"),
    ("users_left_out", pa.int32(), True, "validation users that the champion was trained on"),
    ("ndcg_challenger", pa.float64(), True, "its mean NDCG@k on these users"),
    ("ndcg_champion", pa.float64(), True, "the champion's on the same users and windows"),
    *_interval("difference", "mean paired NDCG@k difference to the champion", nullable=True),
    ("margin", pa.float64(), True, "loss that the interval must exclude"),
    ("confidence", pa.float64(), True, "confidence of the interval"),
    (
        "test_ndcg_challenger",
        pa.float64(),
        True,
        "its NDCG@k in `metric_table`, which decided nothing; NULL: test users were not asked so",
    ),
    ("test_ndcg_champion", pa.float64(), True, "the champion's, when it was promoted"),
    ("prompts_version", pa.string(), True, "version of the challenger's prompts"),
    ("ratings_version", pa.string(), True, "version of the ratings"),
    ("run_id", pa.string(), False, "Dagster run that decided"),
)

#: Schema by asset name. ``*_responses`` and ``*_recommendations`` share one schema each.
SCHEMAS: dict[str, pa.Schema] = {
    "ratings": RATINGS,
    "incoming_ratings": RATINGS,
    "movies": MOVIES,
    "users": USERS,
    "catalogue": CATALOGUE,
    "user_splits": USER_SPLITS,
    "interaction_windows": INTERACTION_WINDOWS,
    "prompts": PROMPTS,
    "sampled_responses": SAMPLED_RESPONSES,
    "preference_pairs": PREFERENCE_PAIRS,
    **{f"{stage}_responses": RESPONSES for stage in ("base", "sft", "dpo", "rlhf")},
    **{f"{stage}_recommendations": RECOMMENDATIONS for stage in ("base", "sft", "dpo", "rlhf")},
    "baseline_recommendations": RECOMMENDATIONS,
    "user_metrics": USER_METRICS,
    "metric_table": METRIC_TABLE,
    "comparisons": COMPARISONS,
    "beyond_accuracy": BEYOND_ACCURACY,
    "group_metrics": GROUP_METRICS,
    "sample_recommendations": SAMPLE_RECOMMENDATIONS,
    "memorisation": MEMORISATION,
    "leave_last_out": LEAVE_LAST_OUT,
    "promotions": PROMOTIONS,
}
