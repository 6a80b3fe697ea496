//! `[reference]`: the reference policy, and whether it moves with the policy.

use serde::{Deserialize, Serialize};

use crate::{actor::EngineSettings, checks::Checks, settings::Settings};

/// Update rule of the reference in training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ReferenceSettings {
    /// Stays what it is at the start of the run.
    Fixed {},
    /// Becomes a copy of the policy at regular intervals.
    Every {
        /// Applied optimiser steps between two copies.
        every_steps: u64,
    },
    /// Is an exponential moving average of the policy's weights.
    Ema {
        /// Weight of the old reference in every step's average; the rest is the policy's.
        decay: f64,
    },
}

impl ReferenceSettings {
    /// Whether the reference may change during a run, so that log-probabilities recorded under it expire.
    #[must_use]
    pub fn moves(&self) -> bool {
        *self != Self::Fixed {}
    }

    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        match *self {
            Self::Fixed {} => return,
            Self::Every { every_steps } => {
                checks.at_least(every_steps, 1, "reference.every_steps");
            }
            Self::Ema { decay } => checks.ratio_below_one(decay, "reference.decay"),
        }
        checks.require(
            matches!(settings.actor.engine, EngineSettings::Own {}),
            "reference.kind",
            "mistral.rs cannot replace the reference: set actor.engine.kind = \"own\" or reference.kind = \"fixed\"",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::tests::assert_reported;

    #[test]
    fn kinds_have_their_own_keys() {
        let of = |text: &str| {
            crate::resolve(text, "test", &[])
                .unwrap()
                .settings
                .reference
        };
        assert_eq!(of(""), ReferenceSettings::Fixed {});
        let every = of("[reference]\nkind = \"every\"\nevery_steps = 7");
        assert_eq!(every, ReferenceSettings::Every { every_steps: 7 });
        let ema = of("[reference]\nkind = \"ema\"\ndecay = 0.5");
        assert_eq!(ema, ReferenceSettings::Ema { decay: 0.5 });
        assert_eq!(
            [of(""), every, ema].map(|kind| kind.moves()),
            [false, true, true]
        );
    }

    #[test]
    fn contradictions_of_a_moving_reference_are_reported() {
        let mistral = "[actor]\nprecision = \"f32\"\n[actor.engine]\nkind = \"mistral\"\n";
        assert_reported(&[
            (
                "[reference]\nkind = \"every\"\nevery_steps = 0",
                "reference.every_steps",
            ),
            (
                "[reference]\nkind = \"ema\"\ndecay = 1.0",
                "reference.decay",
            ),
            ("[reference]\nkind = \"every\"\ndecay = 0.5", "decay"),
            (
                &format!("{mistral}[reference]\nkind = \"ema\""),
                "mistral.rs cannot replace the reference",
            ),
            ("[learner]\nema_decay = 1.0", "learner.ema_decay"),
        ]);
    }
}
