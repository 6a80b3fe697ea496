//! When the preference model is to be fitted again.

/// The rounds of the adversarial game, as the learner sees them: at these steps the policy answers golden
/// prompts for the preference service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounds {
    /// Steps between two rounds.
    pub every: u64,
    /// Rounds in all; 0: as many as there are steps for.
    pub most: u64,
    /// Prompts that are answered in a round.
    pub prompts: usize,
}

impl Rounds {
    /// Whether a round is played after `step` steps, the last one before it after `played`.
    pub(crate) fn due(self, step: u64, played: u64) -> bool {
        let round = step / self.every;
        step > played
            && round > 0
            && step.is_multiple_of(self.every)
            && (self.most == 0 || round <= self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_played_once_at_its_step() {
        let due = |most| {
            let rounds = Rounds {
                every: 5,
                most,
                prompts: 1,
            };
            let mut played = 0;
            let mut at = Vec::new();
            for step in [0, 1, 5, 5, 6, 10, 14, 15, 20] {
                if rounds.due(step, played) {
                    at.push(step);
                    played = step;
                }
            }
            at
        };
        assert_eq!((due(0), due(2)), (vec![5, 10, 15, 20], vec![5, 10]));
    }
}
