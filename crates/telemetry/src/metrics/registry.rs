//! Metric names and their publication to the exporter.
//!
//! This part promises that only declared metrics are published; it does not know what measures them.

use std::collections::{BTreeSet, HashMap};
use std::sync::{LazyLock, Mutex, PoisonError};

use metrics::Label;

use crate::metrics::declaration::{MetricInfo, MetricKind};
use crate::metrics::{measurements::Measurements, table::METRICS};

struct Declared {
    info: &'static MetricInfo,
    prometheus: String,
}

static DECLARED: LazyLock<HashMap<&'static str, Declared>> = LazyLock::new(|| {
    let declared = |info: &'static MetricInfo| {
        (
            info.name,
            Declared {
                info,
                prometheus: info.prometheus_name(),
            },
        )
    };
    METRICS.iter().map(declared).collect()
});

/// The declaration of a journal name.
#[must_use]
pub fn metric(name: &str) -> Option<&'static MetricInfo> {
    declared(name).map(|(declared, _)| declared.info)
}

/// The declaration of a journal name, and the label at its end where it has one.
fn declared(name: &str) -> Option<(&'static Declared, Option<Label>)> {
    if let Some(declared) = DECLARED.get(name) {
        return Some((declared, None)).filter(|(declared, _)| declared.info.label.is_none());
    }
    let (metric, value) = name.rsplit_once('/')?;
    let declared = DECLARED.get(metric)?;
    let label = Label::new(declared.info.label?, value.to_owned());
    Some((declared, Some(label)))
}

/// Publishes the measurements to the current recorder, each with `labels` (`role`, `actor`, `judge`, `stream`);
/// without a recorder this does nothing. Gauges take any value; histograms skip non-finite values, which would
/// corrupt their sum. A name outside [`METRICS`] is not published and logged once as a warning.
///
/// # Panics
/// In debug builds, on a name outside [`METRICS`].
pub fn publish(measurements: &Measurements, labels: &[(&'static str, &str)]) {
    let labels: Vec<_> = labels
        .iter()
        .map(|&(key, value)| Label::new(key, value.to_owned()))
        .collect();
    for (name, value) in measurements.iter() {
        let Some((declared, label)) = declared(name) else {
            warn_once(name);
            debug_assert!(false, "the metric `{name}` is not declared in METRICS");
            continue;
        };
        let prometheus = declared.prometheus.as_str();
        let labels: Vec<_> = labels.iter().cloned().chain(label).collect();
        match declared.info.kind {
            MetricKind::Gauge => metrics::gauge!(prometheus, labels).set(value),
            MetricKind::Histogram if value.is_finite() => {
                metrics::histogram!(prometheus, labels).record(value);
            }
            MetricKind::Histogram => {}
        }
    }
}

/// Registers the help text of every declared metric with the current recorder.
pub(crate) fn describe() {
    for Declared { info, prometheus } in DECLARED.values() {
        let prometheus = prometheus.as_str();
        match info.kind {
            MetricKind::Gauge => metrics::describe_gauge!(prometheus, info.help),
            MetricKind::Histogram => metrics::describe_histogram!(prometheus, info.help),
        }
    }
}

fn warn_once(name: &str) {
    static WARNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if WARNED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(name.to_owned())
    {
        tracing::warn!(metric = name, "metric is not declared and is not published");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::exporter::Exporter;

    /// Names that follow the conventions of TRL and related trainers.
    const CONVENTIONAL: &str = "loss loss/{ipo,dpo,slic,rpo,nash_md_pg,rloo,rejection_sampling,ganpo,preference} \
        rewards/{chosen,rejected,margins,accuracies} logps/{chosen,rejected} \
        objective/{kl,entropy,scores,scores_margin} completions/{mean_length,min_length,max_length} \
        completions/{clipped_ratio,identical_ratio} val/contain_eos_token \
        judge/{latency_seconds,batch_size,timeouts,retries,tie_rate,order_inconsistency} \
        judge/{abstained,cache_hits,queue} \
        preference/{accuracy,ece,brier,drift} actor/{gen_throughput,generate_seconds,in_flight,restarts} \
        staleness/{steps,mean,max,dropped,outstanding} policy_version \
        weight_sync/{seconds,bytes,version,failures} \
        time/{step,wait_for_batch,wait_for_judge,forward,backward,optimizer} idle_ratio \
        perf/{pairs_per_second,tokens_per_second,peak_memory_bytes} \
        mismatch/{kl,k3_kl,logp_abs_diff,ess} \
        eval/{win_rate,win_rate_ci_low,win_rate_ci_high,win_rate_lc,kl,response_length,gold_win_rate} \
        health/{nonfinite_steps,skipped_steps,rollbacks,actor_restarts,judge_circuit_open} \
        ganpo/{d_loss,g_loss,d_accuracy} apo/{round,loss,pairs} \
        beta tau mixture_coef learning_rate grad_norm num_tokens disk/free_bytes \
        stream/{queued,in_flight,fill,redelivered,dead_lettered}";

    /// Names without an established convention.
    const OWN: &str = "loss/hidden_l2 judge/{rate_limited,model_changes,position_bias} \
        judge/{human_verdicts,human_agreement,human_agreement_ci_low,human_agreement_ci_high} \
        actor/quantization_error objective/{log_ratio,label_margin} mismatch/ref_logp_abs_diff \
        grad_clipped_share eval/{prompts,truncation_rate,reference_truncation_rate} reference/version \
        eval/average_{win_rate,win_rate_lc,gold_win_rate,kl} \
        epoch pairs/from_files completions/no_signal_ratio off_policy/{ess,log_weight,clipped_ratio,masked_ratio} \
        eval/{judge_win_rate,judge_win_rate_ci_low,judge_win_rate_ci_high,judge_win_rate_lc} \
        eval/{judge_agreement,judge_prompts} \
        eval/current_reference_{win_rate,win_rate_lc,gold_win_rate,kl}";

    fn expanded(pattern: &str) -> Vec<String> {
        match pattern.split_once('{') {
            None => vec![pattern.to_owned()],
            Some((topic, names)) => names
                .trim_end_matches('}')
                .split(',')
                .map(|name| format!("{topic}{name}"))
                .collect(),
        }
    }

    #[test]
    fn the_table_declares_exactly_these_names() {
        let names = CONVENTIONAL
            .split_whitespace()
            .chain(OWN.split_whitespace());
        let expected: BTreeSet<_> = names.flat_map(expanded).collect();
        let registry: BTreeSet<_> = METRICS.iter().map(|info| info.name.to_owned()).collect();
        assert_eq!(registry, expected);
        assert_eq!(METRICS.len(), expected.len(), "a name is declared twice");
    }

    #[test]
    fn prometheus_names_are_valid_distinct_and_end_in_their_unit() {
        let names: BTreeSet<_> = METRICS.iter().map(MetricInfo::prometheus_name).collect();
        assert_eq!(names.len(), METRICS.len());
        for name in &names {
            assert!(
                name.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
            );
        }
        let cases = [
            ("loss", "agon_loss"),
            ("eval/win_rate", "agon_eval_win_rate"),
            ("time/step", "agon_time_step_seconds"),
            ("judge/latency_seconds", "agon_judge_latency_seconds"),
            ("weight_sync/bytes", "agon_weight_sync_bytes"),
            ("perf/peak_memory_bytes", "agon_perf_peak_memory_bytes"),
        ];
        for (name, expected) in cases {
            assert_eq!(metric(name).unwrap().prometheus_name(), expected);
        }
        assert_eq!(metric("no/such"), None);
        assert_eq!(metric("eval/judge_win_rate"), None, "it names no judge");
        assert_eq!(metric("eval/win_rate/strict"), None, "it is not of judges");
        let of_judge = metric("eval/judge_win_rate/strict").unwrap();
        assert_eq!(of_judge.prometheus_name(), "agon_eval_judge_win_rate");
    }

    #[test]
    fn published_metrics_are_rendered_with_labels_and_help() {
        let recording = Exporter::recorder_only();
        let step = [
            ("eval/win_rate", 0.75),
            ("time/step", 0.2),
            ("loss", f64::NAN),
            ("eval/judge_win_rate/strict", 0.25),
        ];
        let slow = [("time/step", f64::NAN), ("time/step", 40.0)];
        recording.during(|| {
            publish(&step.into_iter().collect(), &[("role", "learner")]);
            for (name, value) in slow {
                publish(
                    &[(name, value)].into_iter().collect(),
                    &[("role", "learner")],
                );
            }
        });
        let page = recording.render();
        for line in [
            "# HELP agon_eval_win_rate fraction of prompts on which the policy beats the reference of the start",
            "# TYPE agon_eval_win_rate gauge",
            "agon_eval_win_rate{role=\"learner\"} 0.75",
            "agon_loss{role=\"learner\"} NaN",
            "agon_eval_judge_win_rate{role=\"learner\",judge=\"strict\"} 0.25",
            "# TYPE agon_time_step_seconds histogram",
            "agon_time_step_seconds_bucket{role=\"learner\",le=\"0.1\"} 0",
            "agon_time_step_seconds_bucket{role=\"learner\",le=\"0.3\"} 1",
            "agon_time_step_seconds_bucket{role=\"learner\",le=\"100\"} 2",
            "agon_time_step_seconds_sum{role=\"learner\"} 40.2",
            "agon_time_step_seconds_count{role=\"learner\"} 2",
        ] {
            assert!(
                page.lines().any(|l| l == line),
                "no line {line:?} in\n{page}"
            );
        }
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "the metric `no/such` is not declared")]
    fn an_undeclared_name_panics_in_debug_builds() {
        publish(&[("no/such", 1.0)].into_iter().collect(), &[]);
    }
}
