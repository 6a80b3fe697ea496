//! Per-step metrics beside the trainer's: settings in force, staleness, and the progress line.

use messages::LabelledPair;
use settings::ObjectiveSettings;
use telemetry::{Measurements, publish};

use crate::evaluation::Evaluation;

/// The objective's temperature under its own name, if it has one, and the mean `mixture_coef` of the completions.
pub(crate) fn settings_metrics(
    objective: &ObjectiveSettings,
    pairs: &[LabelledPair],
) -> Measurements {
    let name = match objective {
        ObjectiveSettings::Ipo { .. } | ObjectiveSettings::NashMdPg { .. } => Some("tau"),
        ObjectiveSettings::Dpo { .. }
        | ObjectiveSettings::Slic { .. }
        | ObjectiveSettings::Rpo { .. }
        | ObjectiveSettings::Rloo { .. } => Some("beta"),
        ObjectiveSettings::RejectionSampling {} => None,
    };
    let temperature = name.map(|name| (name, objective.temperature()));
    let completions = || {
        let all = pairs.iter().flat_map(|labelled| &labelled.pair.completions);
        all.filter(|completion| completion.is_recorded())
    };
    let sum: f64 = completions().map(|c| f64::from(c.mixture_coef)).sum();
    let mean = sum / completions().count().max(1) as f64;
    let mixture = [("mixture_coef", mean)];
    temperature.into_iter().chain(mixture).collect()
}

/// Publishes the staleness of every pair of a step, for the histogram.
pub(crate) fn publish_staleness(staleness: &[u64]) {
    for &steps in staleness {
        let steps = [("staleness/steps", steps as f64)].into_iter().collect();
        publish(&steps, &[("role", "learner")]);
    }
}

/// Progress line of a step: loss, KL, throughput, staleness and share of time spent waiting.
pub(crate) fn progress_line(step: &Measurements, last: Option<&Evaluation>) -> String {
    let of = |name| step.get(name).unwrap_or(f64::NAN);
    let win_rate = last.map_or(String::new(), |e| {
        format!("win rate {:.3} (step {})  ", e.win_rate.mean, e.step)
    });
    let identical = of("completions/identical_ratio");
    let identical = match identical > 0.5 {
        true => format!("  identical {:.0} %", 100.0 * identical),
        false => String::new(),
    };
    // Not every step's samples can estimate the KL.
    let kl = match step.get("objective/kl") {
        Some(kl) => format!("kl {kl:.3}"),
        None => format!("log-ratio {:.3}", of("objective/log_ratio")),
    };
    format!(
        "{win_rate}loss {:.4}  {kl}  margin {:.3}  {:.0} pairs/s  stale {:.1}  waits {:.0} %{identical}",
        of("loss"),
        of("rewards/margins"),
        of("perf/pairs_per_second"),
        of("staleness/mean"),
        100.0 * of("idle_ratio"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_fits_on_one_line() {
        let step = [
            ("loss", 0.25),
            ("objective/kl", 1.5),
            ("rewards/margins", -0.125),
            ("perf/pairs_per_second", 93.6),
            ("staleness/mean", 0.75),
            ("idle_ratio", 0.336),
        ];
        assert_eq!(
            progress_line(&step.into_iter().collect(), None),
            "loss 0.2500  kl 1.500  margin -0.125  94 pairs/s  stale 0.8  waits 34 %"
        );
        let off_policy = [("objective/log_ratio", 0.75)].into_iter().collect();
        assert!(progress_line(&off_policy, None).contains("  log-ratio 0.750  margin"));
    }

    #[test]
    fn the_objectives_temperature_has_its_own_name() {
        let dpo = settings_metrics(&ObjectiveSettings::Dpo { beta: 0.25 }, &[]);
        assert_eq!((dpo.get("beta"), dpo.get("tau")), (Some(0.25), None));
        let nash = settings_metrics(&ObjectiveSettings::NashMdPg { tau: 0.5 }, &[]);
        assert_eq!((nash.get("beta"), nash.get("tau")), (None, Some(0.5)));
    }
}
