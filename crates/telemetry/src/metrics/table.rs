//! Declarations of all metrics: name, kind, unit, help text.
//!
//! A metric that is not declared here is not published. The names are those of `metrics.jsonl`.

use crate::metrics::declaration::MetricUnit::{
    Bytes, Count, Nats, Number, PairsPerSecond, Ratio, Seconds, Steps, Tokens, TokensPerSecond,
};
use crate::metrics::declaration::{MetricInfo, MetricKind, MetricUnit};

/// All metrics, grouped by topic.
pub const METRICS: &[MetricInfo] = &[
    // The loss.
    gauge("loss", Number, "total loss of the step"),
    gauge("loss/ipo", Number, "IPO loss"),
    gauge("loss/dpo", Number, "DPO loss"),
    gauge("loss/slic", Number, "SLiC hinge loss"),
    gauge(
        "loss/rpo",
        Number,
        "RPO loss: DPO term plus negative log-likelihood of the golden answers",
    ),
    gauge(
        "loss/nash_md_pg",
        Number,
        "Nash-MD policy-gradient surrogate; only its gradient is meaningful, not its value",
    ),
    gauge(
        "loss/rloo",
        Number,
        "RLOO policy-gradient surrogate; only its gradient is meaningful, not its value",
    ),
    gauge(
        "loss/rejection_sampling",
        Number,
        "negative log-likelihood of the preferred completions",
    ),
    gauge(
        "loss/ganpo",
        Number,
        "lambda times the GANPO generator loss",
    ),
    gauge(
        "loss/hidden_l2",
        Number,
        "learner.hidden_l2 times the mean squared difference of the last hidden states of policy and reference",
    ),
    gauge(
        "loss/preference",
        Number,
        "training loss of the preference model",
    ),
    // Implicit rewards.
    gauge(
        "rewards/chosen",
        Nats,
        "implicit reward beta * log(pi/ref) of the preferred completions, mean",
    ),
    gauge(
        "rewards/rejected",
        Nats,
        "implicit reward beta * log(pi/ref) of the rejected completions, mean",
    ),
    gauge(
        "rewards/margins",
        Nats,
        "chosen minus rejected implicit reward, mean",
    ),
    gauge(
        "rewards/accuracies",
        Ratio,
        "fraction of pairs with a larger implicit reward for the preferred completion",
    ),
    gauge(
        "logps/chosen",
        Nats,
        "log-probability of the preferred completions, mean",
    ),
    gauge(
        "logps/rejected",
        Nats,
        "log-probability of the rejected completions, mean",
    ),
    // The objective.
    gauge(
        "objective/kl",
        Nats,
        "KL of the policy from the reference per completion; only when the step's samples are on-policy: \
         max_staleness 0, mixture_coef 0, temperature 1, no truncation, actors with the learner's weights in f32; \
         dropped identical completions are included, and those that learner.pair_selection and min_margin leave out",
    ),
    gauge(
        "objective/log_ratio",
        Nats,
        "mean log(pi/ref) of the step's completions under their behaviour policies, without those that \
         learner.pair_selection leaves out; not a KL estimate",
    ),
    gauge(
        "objective/entropy",
        Nats,
        "mean entropy of the policy's next-token distribution over the tokens of the step's completions, without those \
         that learner.pair_selection leaves out",
    ),
    gauge(
        "objective/scores",
        Number,
        "mean score of the step's sampled completions, for judges that score completions; of the files' without samples",
    ),
    gauge(
        "objective/scores_margin",
        Number,
        "mean absolute score difference within a pair, for judges that score completions",
    ),
    gauge(
        "objective/label_margin",
        Number,
        "mean |2p - 1| of the labels trained on: 0 undecided, 1 certain",
    ),
    // Completions.
    gauge(
        "completions/mean_length",
        Tokens,
        "mean length of the step's sampled completions, of the files' in a step without samples",
    ),
    gauge(
        "completions/min_length",
        Tokens,
        "length of the shortest of the completions in completions/mean_length",
    ),
    gauge(
        "completions/max_length",
        Tokens,
        "length of the longest of the completions in completions/mean_length",
    ),
    gauge(
        "completions/identical_ratio",
        Ratio,
        "fraction of prompts since the last step that were dropped because all completions were identical",
    ),
    gauge(
        "completions/no_signal_ratio",
        Ratio,
        "fraction of the labelled pairs since the last step that were dropped because every |p - 1/2| was below \
         learner.min_margin; the means over the other pairs are biased toward prompts that the judge finds easy",
    ),
    gauge(
        "completions/clipped_ratio",
        Ratio,
        "fraction of sampled completions truncated at max_new_tokens",
    ),
    gauge(
        "val/contain_eos_token",
        Ratio,
        "fraction of sampled completions with an end-of-text token",
    ),
    // The judge.
    seconds(
        "judge/latency_seconds",
        "time from submission of a comparison to its verdict",
    ),
    gauge(
        "judge/batch_size",
        Count,
        "mean number of comparisons per judge call",
    ),
    gauge(
        "judge/timeouts",
        Count,
        "judge calls that timed out, since the run began",
    ),
    gauge(
        "judge/retries",
        Count,
        "retried judge calls, since the run began",
    ),
    gauge(
        "judge/rate_limited",
        Count,
        "judge calls refused with \"too many requests\", since the run began",
    ),
    gauge(
        "judge/model_changes",
        Count,
        "models or versions that a remote judge answered as after its first, since the run began",
    ),
    gauge(
        "judge/human_verdicts",
        Count,
        "verdicts that people gave on the page on pairs of this run",
    ),
    gauge(
        "judge/human_agreement",
        Ratio,
        "fraction of the pairs with a verdict of a person and of the judge on which both prefer the same completion",
    ),
    gauge(
        "judge/human_agreement_ci_low",
        Ratio,
        "lower end of its 95 % interval",
    ),
    gauge(
        "judge/human_agreement_ci_high",
        Ratio,
        "upper end of its 95 % interval",
    ),
    gauge("judge/tie_rate", Ratio, "fraction of labels that are ties"),
    gauge(
        "judge/abstained",
        Count,
        "comparisons without a verdict because the judge abstained, since the run began",
    ),
    gauge(
        "judge/cache_hits",
        Count,
        "comparisons answered from the cache, since the run began",
    ),
    gauge("judge/queue", Count, "comparisons queued for a judge"),
    gauge(
        "judge/order_inconsistency",
        Ratio,
        "fraction of comparisons whose winner depends on the order of the completions",
    ),
    gauge(
        "judge/position_bias",
        Number,
        "mean preference for the completion that the judge sees first, minus 0.5; 0 without a position bias",
    ),
    gauge(
        "preference/accuracy",
        Ratio,
        "accuracy of the preference model on held-out pairs",
    ),
    gauge(
        "preference/ece",
        Ratio,
        "expected calibration error of the preference model on held-out pairs",
    ),
    gauge(
        "preference/brier",
        Number,
        "Brier score of the preference model on held-out pairs",
    ),
    gauge(
        "preference/drift",
        Number,
        "mean change of the preference model's probabilities since its previous version",
    ),
    // Actors.
    gauge(
        "actor/gen_throughput",
        TokensPerSecond,
        "tokens generated per second",
    ),
    seconds(
        "actor/generate_seconds",
        "time to generate a batch of pairs",
    ),
    gauge(
        "actor/quantization_error",
        Nats,
        "quantisation error: mean absolute difference per token of the sampler's log-probabilities from f32, measured on one prompt per weights version",
    ),
    gauge(
        "actor/in_flight",
        Count,
        "prompts that an actor has received and not completed",
    ),
    gauge(
        "actor/restarts",
        Count,
        "restarts of this actor, since the run began",
    ),
    // Staleness.
    MetricInfo {
        name: "staleness/steps",
        kind: MetricKind::Histogram,
        unit: Steps,
        help: "staleness of each pair trained on; not in metrics.jsonl",
        label: None,
    },
    gauge(
        "staleness/mean",
        Steps,
        "mean staleness of the step's pairs",
    ),
    gauge(
        "staleness/max",
        Steps,
        "maximum staleness of the step's pairs",
    ),
    gauge(
        "staleness/dropped",
        Count,
        "pairs dropped as stale, since the run began",
    ),
    gauge(
        "staleness/outstanding",
        Count,
        "training prompts sent and not yet back as a labelled pair or a drop note",
    ),
    gauge(
        "pairs/from_files",
        Count,
        "pairs of the step that came from files; only with [pairs]",
    ),
    gauge(
        "epoch",
        Number,
        "passes over the pairs of the files; only with [pairs]",
    ),
    gauge(
        "policy_version",
        Count,
        "weights version of the learner's policy",
    ),
    gauge(
        "reference/version",
        Count,
        "step after which the reference last changed, of a reference that moves (reference.kind); 0: the start",
    ),
    // Weight sync.
    seconds("weight_sync/seconds", "time to publish or load weights"),
    gauge(
        "weight_sync/bytes",
        Bytes,
        "size of the weights last published or loaded",
    ),
    gauge(
        "weight_sync/version",
        Count,
        "the weights version last published or loaded",
    ),
    gauge(
        "weight_sync/failures",
        Count,
        "failed publications or loads, since the run began",
    ),
    // Waiting.
    seconds("time/step", "duration of a learner step, waiting included"),
    seconds(
        "time/wait_for_batch",
        "time the learner waited for labelled pairs",
    ),
    seconds(
        "time/wait_for_judge",
        "time that a pair waited for its label",
    ),
    seconds("time/forward", "duration of the forward pass"),
    seconds("time/backward", "duration of the backward pass"),
    seconds("time/optimizer", "duration of the optimiser update"),
    gauge("idle_ratio", Ratio, "fraction of the step spent waiting"),
    // Throughput.
    gauge(
        "perf/pairs_per_second",
        PairsPerSecond,
        "pairs trained on per second",
    ),
    gauge(
        "perf/tokens_per_second",
        TokensPerSecond,
        "tokens trained on per second",
    ),
    gauge(
        "perf/peak_memory_bytes",
        Bytes,
        "peak resident memory of this process",
    ),
    // Mismatch between the log-probabilities recorded by the actors and those computed by the learner.
    gauge(
        "mismatch/kl",
        Nats,
        "mean per token of log pi as recorded by the actor minus log pi of the learner: staleness and numerical differences",
    ),
    gauge(
        "mismatch/k3_kl",
        Nats,
        "k3 estimate of mismatch/kl, never negative",
    ),
    gauge(
        "mismatch/logp_abs_diff",
        Nats,
        "mean absolute difference per token of log pi, recorded against recomputed",
    ),
    gauge(
        "mismatch/ess",
        Ratio,
        "effective sample size of the importance weights pi now / pi as recorded, as a fraction",
    ),
    gauge(
        "mismatch/ref_logp_abs_diff",
        Nats,
        "mean absolute difference per token of log ref, recorded against recomputed: numerical differences only; \
         pairs that were recorded under an earlier reference are left out. With actor.mixture_coef = 0 actors record log ref of \
         one prompt a version",
    ),
    // Importance weights of the labels: w is the product of pi now / pi that sampled over a label's two completions.
    gauge(
        "off_policy/ess",
        Ratio,
        "effective sample size (sum w)^2 / (n sum w^2) of the labels' importance weights w before any bound, as a \
         fraction; w is the product of pi now / behaviour policy as recorded over both completions, and with actors in \
         bf16 or int8 not exactly 1 for current weights. Not reported for pairs from files, and for samples of the \
         mixture only with learner.off_policy",
    ),
    gauge(
        "off_policy/log_weight",
        Nats,
        "mean log of the labels' importance weights: minus the divergence of the policy from its stale, tempered or \
         quantised samplers",
    ),
    gauge(
        "off_policy/clipped_ratio",
        Ratio,
        "fraction of labels with an importance weight above learner.max_ratio, which off_policy \"truncate\" bounds",
    ),
    gauge(
        "off_policy/masked_ratio",
        Ratio,
        "fraction of labels with an importance weight outside [1/max_ratio, max_ratio], which off_policy \"mask\" leaves out",
    ),
    // Evaluation.
    gauge(
        "eval/win_rate",
        Ratio,
        "fraction of prompts on which the policy beats the reference of the start",
    ),
    gauge(
        "eval/win_rate_ci_low",
        Ratio,
        "lower bound of the win rate's 95 % confidence interval",
    ),
    gauge(
        "eval/win_rate_ci_high",
        Ratio,
        "upper bound of the win rate's 95 % confidence interval",
    ),
    gauge("eval/win_rate_lc", Ratio, "length-controlled win rate"),
    gauge(
        "eval/kl",
        Nats,
        "KL of the policy from the reference of the start per completion on evaluation prompts, estimated from \
         samples at temperature 1 without truncation",
    ),
    gauge(
        "eval/response_length",
        Tokens,
        "mean length of the policy's evaluation completions",
    ),
    gauge(
        "eval/gold_win_rate",
        Ratio,
        "win rate under the playground's or bandit's known preference",
    ),
    of_judges(
        "eval/judge_win_rate",
        Ratio,
        "win rate under an evaluation judge, which gives no labels",
    ),
    of_judges(
        "eval/judge_win_rate_ci_low",
        Ratio,
        "lower bound of that win rate's 95 % confidence interval",
    ),
    of_judges(
        "eval/judge_win_rate_ci_high",
        Ratio,
        "upper bound of that win rate's 95 % confidence interval",
    ),
    of_judges(
        "eval/judge_win_rate_lc",
        Ratio,
        "length-controlled win rate under an evaluation judge",
    ),
    of_judges(
        "eval/judge_agreement",
        Ratio,
        "fraction of prompts on which an evaluation judge and the run's judge prefer the same completion, ties excluded",
    ),
    of_judges(
        "eval/judge_prompts",
        Count,
        "distinct prompts that an evaluation judge judged",
    ),
    gauge(
        "eval/average_win_rate",
        Ratio,
        "win rate of the moving average of the policy's weights (learner.ema_decay) against the reference of the start",
    ),
    gauge(
        "eval/average_win_rate_lc",
        Ratio,
        "length-controlled win rate of the moving average",
    ),
    gauge(
        "eval/average_gold_win_rate",
        Ratio,
        "win rate of the moving average under the playground's or bandit's known preference",
    ),
    gauge(
        "eval/average_kl",
        Nats,
        "KL of the moving average from the reference of the start per completion",
    ),
    gauge(
        "eval/current_reference_win_rate",
        Ratio,
        "win rate of the policy against the reference that the step's pairs had, once that has moved; eval/win_rate is against the start",
    ),
    gauge(
        "eval/current_reference_win_rate_lc",
        Ratio,
        "length-controlled win rate against the current reference",
    ),
    gauge(
        "eval/current_reference_gold_win_rate",
        Ratio,
        "win rate against the current reference under the playground's or bandit's known preference",
    ),
    gauge(
        "eval/current_reference_kl",
        Nats,
        "KL of the policy from the current reference per completion",
    ),
    gauge(
        "eval/prompts",
        Count,
        "distinct prompts judged in the evaluation",
    ),
    gauge(
        "eval/truncation_rate",
        Ratio,
        "fraction of the policy's evaluation completions truncated at the maximum length",
    ),
    gauge(
        "eval/reference_truncation_rate",
        Ratio,
        "fraction of the reference's evaluation completions truncated at the maximum length",
    ),
    // Health.
    gauge(
        "health/nonfinite_steps",
        Count,
        "steps rejected because the loss or gradient was not finite, since the run began",
    ),
    gauge(
        "health/skipped_steps",
        Count,
        "steps rejected because the loss or gradient was not finite or far beyond the run's past, since the run began",
    ),
    gauge(
        "health/rollbacks",
        Count,
        "rollbacks to the last checkpoint, since the run began",
    ),
    gauge(
        "health/actor_restarts",
        Count,
        "restarts of all actors, since the run began",
    ),
    gauge(
        "health/judge_circuit_open",
        Number,
        "1 while the judge's circuit breaker is open, else 0",
    ),
    // Streams between the roles.
    gauge(
        "stream/queued",
        Count,
        "messages of a stream that wait for delivery",
    ),
    gauge(
        "stream/in_flight",
        Count,
        "delivered messages of a stream that are not yet acknowledged",
    ),
    gauge(
        "stream/fill",
        Ratio,
        "used fraction of a stream's capacity; senders to a full stream wait",
    ),
    gauge(
        "stream/redelivered",
        Count,
        "messages of a stream that were delivered again",
    ),
    gauge(
        "stream/dead_lettered",
        Count,
        "messages of a stream in the run's dead-letter stream, which keeps the last 1,000: undecodable, invalid, or delivered too often",
    ),
    gauge(
        "disk/free_bytes",
        Bytes,
        "free space on the file system of the run directory",
    ),
    // Adversarial training: GANPO and APO.
    gauge("ganpo/d_loss", Number, "loss of the discriminators"),
    gauge(
        "ganpo/g_loss",
        Number,
        "generator loss: how well the policy fools the discriminators",
    ),
    gauge("ganpo/d_accuracy", Ratio, "accuracy of the discriminators"),
    gauge("apo/round", Count, "index of the last APO round"),
    gauge(
        "apo/loss",
        Number,
        "adversarial loss of the preference model at the end of the APO round",
    ),
    gauge(
        "apo/pairs",
        Count,
        "golden-against-sample pairs of the APO round",
    ),
    // Current hyperparameters and progress.
    gauge("beta", Number, "current regularisation strength beta"),
    gauge("tau", Number, "current regularisation strength tau"),
    gauge(
        "mixture_coef",
        Ratio,
        "weight of the reference in the mixture policy",
    ),
    gauge("learning_rate", Number, "current learning rate"),
    gauge("grad_norm", Number, "gradient norm before clipping"),
    gauge(
        "grad_clipped_share",
        Ratio,
        "fraction of the run's steps with a clipped gradient",
    ),
    gauge(
        "num_tokens",
        Tokens,
        "tokens trained on, since the run began",
    ),
];

const fn gauge(name: &'static str, unit: MetricUnit, help: &'static str) -> MetricInfo {
    MetricInfo {
        name,
        kind: MetricKind::Gauge,
        unit,
        help,
        label: None,
    }
}

/// A gauge of every evaluation judge, whose name follows in the journal.
const fn of_judges(name: &'static str, unit: MetricUnit, help: &'static str) -> MetricInfo {
    MetricInfo {
        label: Some("judge"),
        ..gauge(name, unit, help)
    }
}

/// A duration, published as a histogram.
const fn seconds(name: &'static str, help: &'static str) -> MetricInfo {
    MetricInfo {
        name,
        kind: MetricKind::Histogram,
        unit: Seconds,
        help,
        label: None,
    }
}
