//! Order of annotated pairs and golden answers over the steps of an epoch.

use dataset::shuffled;
use messages::Seed;
use model::within_tokens;
use settings::FitSettings;

use crate::error::PreferenceError;
use crate::reward_training::{AdversarialExample, PreferenceExample, TrainingData};

/// RNG stream id of the order of golden answers.
const GOLDEN_ORDER: u64 = 0x601d;

/// Epochs over the annotated pairs, each shuffled differently. Golden answers are spread evenly over the steps. If
/// there are fewer than steps, every step has one and they repeat, so that their mean has the weight c whatever their
/// number.
pub(crate) struct EpochOrder<'a> {
    examples: &'a [PreferenceExample],
    adversarial: &'a [AdversarialExample],
    batch: u64,
    steps_in_epoch: u64,
    steps: u64,
    seed: Seed,
}

/// Data of one step.
pub(crate) struct StepRows<'a> {
    /// Annotated pairs.
    pub(crate) examples: Vec<&'a PreferenceExample>,
    /// Golden answers with the policy's samples.
    pub(crate) adversarial: Vec<&'a AdversarialExample>,
    /// Weight of the mean over `adversarial` in this step, such that the mean over the steps of an epoch is the mean
    /// over all golden answers.
    pub(crate) golden_weight: f64,
}

impl<'a> StepRows<'a> {
    /// The same rows in order, in passes of at most `max_tokens` tokens, prompts counted once, unless a single row
    /// exceeds it; 0: no limit.
    pub(crate) fn passes(self, max_tokens: usize) -> Vec<Self> {
        let golden_weight = self.golden_weight;
        let examples = self.examples.into_iter().map(StepRow::Annotated);
        let adversarial = self.adversarial.into_iter().map(StepRow::Adversarial);
        let rows: Vec<StepRow<'a>> = examples.chain(adversarial).collect();
        within_tokens(&rows, max_tokens, StepRow::tokens)
            .map(|rows| Self {
                examples: rows.iter().filter_map(|row| row.annotated()).collect(),
                adversarial: rows.iter().filter_map(|row| row.adversarial()).collect(),
                golden_weight,
            })
            .collect()
    }

    /// Number of comparisons of golden answers with samples.
    pub(crate) fn golden_rows(&self) -> usize {
        self.adversarial.iter().map(|e| e.samples.len()).sum()
    }
}

/// A row of either kind.
enum StepRow<'a> {
    Annotated(&'a PreferenceExample),
    Adversarial(&'a AdversarialExample),
}

impl<'a> StepRow<'a> {
    fn tokens(&self) -> usize {
        match self {
            Self::Annotated(row) => row.tokens(),
            Self::Adversarial(row) => {
                let samples: usize = row.samples.iter().map(Vec::len).sum();
                row.prompt.len() + row.golden.len() + samples
            }
        }
    }

    fn annotated(&self) -> Option<&'a PreferenceExample> {
        match self {
            Self::Annotated(row) => Some(row),
            Self::Adversarial(_) => None,
        }
    }

    fn adversarial(&self) -> Option<&'a AdversarialExample> {
        match self {
            Self::Annotated(_) => None,
            Self::Adversarial(row) => Some(row),
        }
    }
}

impl<'a> EpochOrder<'a> {
    pub(crate) fn new(
        settings: &FitSettings,
        data: TrainingData<'a>,
        seed: Seed,
    ) -> Result<Self, PreferenceError> {
        let adversarial = data.adversarial;
        let examples = if adversarial.is_empty() || data.apo.annotated {
            data.examples
        } else {
            &[]
        };
        let rows = if examples.is_empty() {
            adversarial.len()
        } else {
            examples.len()
        } as u64;
        if rows == 0 {
            return Err(PreferenceError::NothingToFit);
        }
        let batch = settings.train_batch_size as u64;
        let steps_in_epoch = rows.div_ceil(batch);
        Ok(Self {
            examples,
            adversarial,
            batch,
            steps_in_epoch,
            steps: steps_in_epoch * settings.epochs as u64,
            seed,
        })
    }

    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    /// Data of step `step`, from 0.
    pub(crate) fn step(&self, step: u64) -> StepRows<'a> {
        let (epoch, step_in_epoch) = (step / self.steps_in_epoch, step % self.steps_in_epoch);
        let examples = shuffled_rows(
            self.examples,
            step_in_epoch * self.batch..(step_in_epoch + 1) * self.batch,
            epoch,
            self.seed,
        );
        let count = self.adversarial.len() as u64;
        let (epoch, indices, golden_weight) = if count < self.steps_in_epoch {
            // One per step, repeating across epochs.
            let cycle = step / count.max(1);
            let index = step % count.max(1);
            (cycle, index..(index + 1).min(count), 1.0)
        } else {
            let start = |step: u64| step * count / self.steps_in_epoch;
            let indices = start(step_in_epoch)..start(step_in_epoch + 1);
            let scaled = (indices.end - indices.start) * self.steps_in_epoch;
            (epoch, indices, scaled as f64 / count as f64)
        };
        StepRows {
            examples,
            adversarial: shuffled_rows(
                self.adversarial,
                indices,
                epoch,
                self.seed.derive(GOLDEN_ORDER),
            ),
            golden_weight,
        }
    }
}

/// Rows at these indices of the shuffled order of an epoch.
fn shuffled_rows<T>(rows: &[T], indices: std::ops::Range<u64>, epoch: u64, seed: Seed) -> Vec<&T> {
    let count = rows.len() as u64;
    (indices.start..indices.end.min(count))
        .map(|index| &rows[shuffled(epoch * count + index, count, seed) as usize])
        .collect()
}

#[cfg(test)]
mod tests {
    use settings::resolve;

    use super::*;

    fn adversarial_example(id: u32) -> AdversarialExample {
        AdversarialExample {
            prompt: vec![id],
            golden: vec![0],
            samples: vec![vec![1]],
        }
    }

    fn example(id: u32) -> PreferenceExample {
        PreferenceExample {
            prompt: vec![id],
            first: vec![0],
            second: vec![1],
            label: 1.0,
        }
    }

    fn settings(batch: usize) -> settings::PreferenceSettings {
        let text = format!("[preference.fit]\nepochs = 2\ntrain_batch_size = {batch}");
        let resolved = resolve(&text, "t", &[]);
        resolved.expect("it resolves").settings.preference
    }

    /// c multiplies the mean over all golden answers (Cheng et al. 2311.08045), whatever their number: also for 256
    /// golden answers in 1,875 steps.
    #[test]
    fn the_golden_term_has_weight_one_in_every_epoch() {
        for (pairs, golden, batch) in [(60_000, 256, 32), (40, 5, 4), (10, 5, 4), (40, 33, 4)] {
            let settings = settings(batch);
            let examples: Vec<_> = (0..pairs).map(example).collect();
            let adversarial: Vec<_> = (0..golden).map(adversarial_example).collect();
            let data = TrainingData {
                examples: &examples,
                adversarial: &adversarial,
                apo: &settings.apo,
            };
            let order = EpochOrder::new(&settings.fit, data, Seed(3)).expect("there are rows");
            let steps = order.steps_in_epoch;
            // With its index as the loss of a golden answer, the mean is (golden - 1) / 2.
            let mut weight = 0.0;
            let mut mean = 0.0;
            for rows in (0..steps).map(|step| order.step(step)) {
                let losses = rows.adversarial.iter().map(|c| f64::from(c.prompt[0]));
                let of_step = losses.sum::<f64>() / rows.adversarial.len() as f64;
                weight += rows.golden_weight / steps as f64;
                mean += rows.golden_weight * of_step / steps as f64;
            }
            assert!((weight - 1.0).abs() < 1e-9, "{golden} of {pairs}: {weight}");
            let expected = f64::from(golden - 1) / 2.0;
            let close = (mean / expected - 1.0).abs() < 0.03;
            assert!(close, "{golden} of {pairs}: {mean} for {expected}");
        }
    }

    #[test]
    fn every_row_occurs_once_per_epoch_and_golden_answers_are_spread() {
        let settings = settings(4);
        let examples: Vec<_> = (0..10).map(example).collect();
        let adversarial: Vec<_> = (0..5).map(adversarial_example).collect();
        let data = TrainingData {
            examples: &examples,
            adversarial: &adversarial,
            apo: &settings.apo,
        };
        let order = EpochOrder::new(&settings.fit, data, Seed(3)).expect("there are rows");
        assert_eq!(order.steps(), 6);
        let (mut seen, mut golden) = (Vec::new(), Vec::new());
        for step in 0..3 {
            let StepRows {
                examples,
                adversarial,
                ..
            } = order.step(step);
            assert!(
                adversarial.len() == 1 || adversarial.len() == 2,
                "{}",
                adversarial.len()
            );
            seen.extend(examples.iter().map(|e| e.prompt[0]));
            golden.extend(adversarial.iter().map(|c| c.prompt[0]));
        }
        seen.sort_unstable();
        golden.sort_unstable();
        assert_eq!((seen, golden), ((0..10).collect(), (0..5).collect()));

        let mut without = settings.apo.clone();
        without.annotated = false;
        let data = TrainingData {
            apo: &without,
            ..data
        };
        let order = EpochOrder::new(&settings.fit, data, Seed(3)).expect("there are rows");
        assert_eq!(order.steps(), 4);
        assert!((0..4).all(|step| {
            let rows = order.step(step);
            rows.examples.is_empty() && !rows.adversarial.is_empty()
        }));

        let none = TrainingData {
            examples: &[],
            adversarial: &[],
            apo: &without,
        };
        assert!(matches!(
            EpochOrder::new(&settings.fit, none, Seed(3)),
            Err(PreferenceError::NothingToFit)
        ));
    }

    /// Four pairs, then two golden answers, of three tokens each.
    #[test]
    fn passes_hold_rows_up_to_the_limit_in_order() {
        let settings = settings(4);
        let examples: Vec<_> = (0..4).map(example).collect();
        let adversarial: Vec<_> = (0..2).map(adversarial_example).collect();
        let data = TrainingData {
            examples: &examples,
            adversarial: &adversarial,
            apo: &settings.apo,
        };
        let order = EpochOrder::new(&settings.fit, data, Seed(3)).expect("there are rows");
        for (limit, expected) in [
            (0, &[(4, 2)][..]),
            (18, &[(4, 2)]),
            (17, &[(4, 1), (0, 1)]),
            (12, &[(4, 0), (0, 2)]),
            (8, &[(2, 0), (2, 0), (0, 2)]),
            (1, &[(1, 0), (1, 0), (1, 0), (1, 0), (0, 1), (0, 1)]),
        ] {
            let passes = order.step(0).passes(limit);
            let sizes = passes
                .iter()
                .map(|p| (p.examples.len(), p.adversarial.len()));
            assert_eq!(sizes.collect::<Vec<_>>(), expected, "{limit}");
            let golden: usize = passes.iter().map(StepRows::golden_rows).sum();
            assert_eq!(golden, 2);
        }
    }
}
