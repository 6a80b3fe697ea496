//! Every metric of the field, declared once: its name, what it is, and what it says.
//!
//! A metric that is not here is not published. The names are those of `metrics.jsonl`.

use crate::registry::MetricUnit::{
    Bytes, Count, Nats, Number, PairsPerSecond, Ratio, Seconds, Steps, Tokens, TokensPerSecond,
};
use crate::registry::{MetricInfo, MetricKind, MetricUnit};

/// Every metric there is, topic by topic.
pub const METRICS: &[MetricInfo] = &[
    // The loss.
    gauge("loss", Number, "the step's loss, all its terms together"),
    gauge("loss/ipo", Number, "the IPO term"),
    gauge("loss/dpo", Number, "the DPO term"),
    gauge("loss/slic", Number, "the SLiC hinge term"),
    gauge(
        "loss/rpo",
        Number,
        "the RPO loss: the DPO term and the golden answers' likelihood",
    ),
    gauge(
        "loss/nash_md_pg",
        Number,
        "the Nash-MD policy-gradient surrogate; its gradient means more than its value",
    ),
    gauge(
        "loss/ganpo",
        Number,
        "lambda times the GANPO generator term",
    ),
    gauge(
        "loss/preference",
        Number,
        "the preference model's training loss",
    ),
    // Implicit rewards.
    gauge(
        "rewards/chosen",
        Nats,
        "beta times log pi over ref of the preferred completions, mean",
    ),
    gauge(
        "rewards/rejected",
        Nats,
        "beta times log pi over ref of the other completions, mean",
    ),
    gauge(
        "rewards/margins",
        Nats,
        "chosen minus rejected implicit reward, mean",
    ),
    gauge(
        "rewards/accuracies",
        Ratio,
        "share of pairs whose chosen implicit reward is the larger",
    ),
    gauge(
        "logps/chosen",
        Nats,
        "log-probability of the preferred completions, mean",
    ),
    gauge(
        "logps/rejected",
        Nats,
        "log-probability of the other completions, mean",
    ),
    // The objective.
    gauge(
        "objective/kl",
        Nats,
        "KL of the policy from the reference per completion; only where the step's samples can estimate it: \
         max_staleness 0, mixture_coef 0, temperature 1, no truncation, actors with the learner's own weights in \
         f32; identical completions that were dropped count",
    ),
    gauge(
        "objective/log_ratio",
        Nats,
        "mean log pi over ref of the step's completions, whatever law they were drawn from: not a KL",
    ),
    gauge(
        "objective/entropy",
        Nats,
        "mean entropy of the policy's next token, over the tokens of the step's completions",
    ),
    gauge(
        "objective/scores",
        Number,
        "mean score of the step's completions, where the judge scores completions",
    ),
    gauge(
        "objective/scores_margin",
        Number,
        "mean absolute difference of the scores within a label's pair, where the judge scores completions",
    ),
    gauge(
        "objective/label_margin",
        Number,
        "mean distance of 2p from 1 over the labels trained on: 0 even, 1 certain",
    ),
    // Completions.
    gauge(
        "completions/mean_length",
        Tokens,
        "mean length of the step's completions",
    ),
    gauge(
        "completions/min_length",
        Tokens,
        "length of the shortest completion",
    ),
    gauge(
        "completions/max_length",
        Tokens,
        "length of the longest completion",
    ),
    gauge(
        "completions/identical_ratio",
        Ratio,
        "share of prompts since the last step that were dropped because their completions were the same",
    ),
    gauge(
        "completions/clipped_ratio",
        Ratio,
        "share of completions that reached max_new_tokens",
    ),
    gauge(
        "val/contain_eos_token",
        Ratio,
        "share of completions that hold an end-of-text token",
    ),
    // The judge.
    seconds(
        "judge/latency_seconds",
        "time from a comparison's arrival at the judge to its ruling",
    ),
    gauge(
        "judge/batch_size",
        Count,
        "comparisons asked together, mean",
    ),
    gauge(
        "judge/timeouts",
        Count,
        "calls of the judge that took too long, since the run began",
    ),
    gauge(
        "judge/retries",
        Count,
        "calls of the judge made again, since the run began",
    ),
    gauge("judge/tie_rate", Ratio, "share of labels that are ties"),
    gauge(
        "judge/abstained",
        Count,
        "comparisons the judge declined to answer, since the run began",
    ),
    gauge(
        "judge/cache_hits",
        Count,
        "questions answered from memory, since the run began",
    ),
    gauge("judge/queue", Count, "questions that wait for a judge"),
    gauge(
        "judge/order_inconsistency",
        Ratio,
        "share of pairs whose winner changes with the order of the completions",
    ),
    gauge(
        "preference/accuracy",
        Ratio,
        "share of held-out pairs the preference model orders rightly",
    ),
    gauge(
        "preference/ece",
        Ratio,
        "expected calibration error of the preference model",
    ),
    gauge(
        "preference/brier",
        Number,
        "Brier score of the preference model",
    ),
    gauge(
        "preference/drift",
        Number,
        "change of the preference model's answers since its last version",
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
        "actor/drift",
        Nats,
        "mean distance per token of log-probabilities as written from those in f32, one prompt a version",
    ),
    gauge(
        "actor/in_flight",
        Count,
        "prompts an actor has taken and not yet answered",
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
        help: "age of every pair that was trained on; not in metrics.jsonl",
    },
    gauge("staleness/mean", Steps, "mean age of the pairs a step took"),
    gauge("staleness/max", Steps, "age of the oldest pair a step took"),
    gauge(
        "staleness/dropped",
        Count,
        "pairs dropped as too old, since the run began",
    ),
    gauge(
        "staleness/in_flight",
        Count,
        "prompts sent and not yet trained on",
    ),
    gauge(
        "policy_version",
        Count,
        "the weights version of the learner's policy",
    ),
    // Weight sync.
    seconds("weight_sync/seconds", "time to publish or to load weights"),
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
        "publications or loads that failed, since the run began",
    ),
    // Waiting.
    seconds("time/step", "time of a learner step, waiting included"),
    seconds(
        "time/wait_for_batch",
        "time the learner waited for labelled pairs",
    ),
    seconds("time/wait_for_judge", "time a pair waited for its label"),
    seconds("time/forward", "time of the forward pass"),
    seconds("time/backward", "time of the backward pass"),
    seconds("time/optimizer", "time of the optimiser's update"),
    gauge("idle_ratio", Ratio, "share of the step spent waiting"),
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
        "largest resident memory of this process",
    ),
    // Mismatch: what the actors recorded against what the learner computes of the same tokens.
    gauge(
        "mismatch/kl",
        Nats,
        "mean per token of log pi as its actor recorded it minus log pi now: staleness and arithmetic",
    ),
    gauge(
        "mismatch/k3_kl",
        Nats,
        "the k3 estimate of the same, never negative",
    ),
    gauge(
        "mismatch/logp_abs_diff",
        Nats,
        "mean absolute difference per token of the same",
    ),
    gauge(
        "mismatch/ess",
        Ratio,
        "effective sample size of the completions' weights pi now over pi as recorded, as a share",
    ),
    gauge(
        "mismatch/ref_logp_abs_diff",
        Nats,
        "mean absolute difference per token of log ref as recorded and as the learner computes it: \
         arithmetic alone",
    ),
    // Evaluation.
    gauge(
        "eval/win_rate",
        Ratio,
        "share of prompts on which the policy beats the reference",
    ),
    gauge(
        "eval/win_rate_ci_low",
        Ratio,
        "lower end of the win rate's 95 % interval",
    ),
    gauge(
        "eval/win_rate_ci_high",
        Ratio,
        "upper end of the win rate's 95 % interval",
    ),
    gauge(
        "eval/win_rate_lc",
        Ratio,
        "win rate with length controlled for",
    ),
    gauge(
        "eval/kl",
        Nats,
        "KL of the policy from the reference per completion on evaluation prompts, from samples at \
         temperature 1 without truncation",
    ),
    gauge(
        "eval/response_length",
        Tokens,
        "mean length of the policy's evaluation completions",
    ),
    gauge(
        "eval/gold_win_rate",
        Ratio,
        "win rate under the world's known preference",
    ),
    gauge(
        "eval/prompts",
        Count,
        "prompts of the evaluation that were judged, all distinct",
    ),
    gauge(
        "eval/truncation_rate",
        Ratio,
        "share of the policy's evaluation completions cut off at the longest allowed",
    ),
    gauge(
        "eval/reference_truncation_rate",
        Ratio,
        "share of the reference's evaluation completions cut off at the longest allowed",
    ),
    // Health.
    gauge(
        "health/nonfinite_steps",
        Count,
        "steps with a non-finite loss or gradient, since the run began",
    ),
    gauge(
        "health/skipped_steps",
        Count,
        "steps that changed nothing, since the run began",
    ),
    gauge(
        "health/rollbacks",
        Count,
        "returns to the last good checkpoint, since the run began",
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
    // What lies between the roles.
    gauge(
        "stream/queued",
        Count,
        "messages of a stream that wait to be taken",
    ),
    gauge(
        "stream/in_hand",
        Count,
        "messages of a stream that were taken and not yet acknowledged",
    ),
    gauge(
        "stream/fill",
        Ratio,
        "share of a stream's places that are taken; who sends into a full one waits",
    ),
    gauge(
        "stream/redelivered",
        Count,
        "messages of a stream that came back from who had taken them",
    ),
    gauge(
        "stream/given_up",
        Count,
        "messages of a stream that came back as often as it allows",
    ),
    gauge(
        "disk/free_bytes",
        Bytes,
        "what is free on the disk of the run directory",
    ),
    // Adversaries.
    gauge("ganpo/d_loss", Number, "the discriminators' loss"),
    gauge(
        "ganpo/g_loss",
        Number,
        "the generator's loss against the discriminators",
    ),
    gauge(
        "ganpo/d_accuracy",
        Ratio,
        "share of inputs the discriminators tell rightly",
    ),
    gauge("apo/round", Count, "the adversarial round"),
    gauge(
        "apo/loss",
        Number,
        "the preference model's adversarial loss",
    ),
    gauge("apo/pairs", Count, "pairs of the adversarial round"),
    // Echoes of the settings, and where the run is.
    gauge("beta", Number, "the regularisation strength beta in force"),
    gauge("tau", Number, "the regularisation strength tau in force"),
    gauge(
        "mixture_coef",
        Ratio,
        "the weight on the reference in the mixture policy",
    ),
    gauge("learning_rate", Number, "the learning rate in force"),
    gauge("grad_norm", Number, "norm of the gradient before clipping"),
    gauge(
        "grad_clipped_share",
        Ratio,
        "share of the run's steps whose gradient was clipped",
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
    }
}

/// A time: its distribution is worth more than its last value.
const fn seconds(name: &'static str, help: &'static str) -> MetricInfo {
    MetricInfo {
        name,
        kind: MetricKind::Histogram,
        unit: Seconds,
        help,
    }
}
