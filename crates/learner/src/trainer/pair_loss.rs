//! The loss of a run: its objective, and how completions and labels enter it.

use settings::{LearnerSettings, LogpReduction, ObjectiveSettings, OffPolicy, RpoNll};

use crate::{
    objective::{Dpo, Ipo, NashMdPg, Objective, RejectionSampling, Rloo, Rpo, RpoBaseline, Slic},
    trainer::off_policy::Correction,
};

/// The loss of a run.
pub(super) struct PairLoss {
    pub(super) objective: Box<dyn Objective>,
    /// τ or β: the factor from log-ratios to rewards.
    pub(super) temperature: f64,
    pub(super) reduction: LogpReduction,
    pub(super) correction: Correction,
    /// Weight of the mean squared difference of the last hidden states; 0: off.
    pub(super) hidden_l2: f64,
}

impl PairLoss {
    /// The loss of the settings.
    pub(super) fn new(settings: &LearnerSettings) -> Self {
        Self {
            objective: objective(&settings.objective),
            temperature: settings.objective.temperature(),
            reduction: settings.logp_reduction,
            correction: Correction::new(settings),
            hidden_l2: settings.hidden_l2,
        }
    }

    /// Whether a step reads the reference's hidden states, and not only its log-probabilities.
    pub(super) fn needs_reference_states(&self) -> bool {
        self.correction.kind != OffPolicy::None || self.hidden_l2 > 0.0
    }
}

/// The objective of the settings.
fn objective(settings: &ObjectiveSettings) -> Box<dyn Objective> {
    match *settings {
        ObjectiveSettings::Ipo { tau, scale } => Box::new(Ipo { tau, scale }),
        ObjectiveSettings::Dpo { beta } => Box::new(Dpo { beta }),
        ObjectiveSettings::Slic { beta } => Box::new(Slic { beta }),
        ObjectiveSettings::Rpo {
            beta,
            eta,
            nll,
            nll_coef: coefficient,
        } => {
            let nll = match nll {
                RpoNll::Sum => RpoBaseline::Sum,
                RpoNll::Mean => RpoBaseline::Mean { coefficient },
            };
            Box::new(Rpo { beta, eta, nll })
        }
        ObjectiveSettings::NashMdPg { tau } => Box::new(NashMdPg { tau }),
        ObjectiveSettings::Rloo { beta } => Box::new(Rloo { beta }),
        ObjectiveSettings::RejectionSampling {} => Box::new(RejectionSampling),
    }
}
