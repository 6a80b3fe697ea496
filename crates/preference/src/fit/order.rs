//! Which pairs and which golden answers make which step.

use dataset::shuffled;
use messages::Seed;
use settings::FitSettings;

use super::{Contest, Example, Material};
use crate::PreferenceError;

/// The golden answers are read in an order of their own.
const CONTESTS: u64 = 0x601d;

/// A reading of all pairs, as many epochs as the settings say, each in an order of its own. The golden
/// answers are spread over it evenly: where they are fewer than the steps, every step has one and they are
/// read again and again, so that their mean has the weight c whatever their number.
pub(super) struct Order<'a> {
    examples: &'a [Example],
    contests: &'a [Contest],
    batch: u64,
    steps_in_epoch: u64,
    steps: u64,
    seed: Seed,
}

/// The rows of one step.
pub(super) struct StepRows<'a> {
    /// Annotated pairs.
    pub(super) examples: Vec<&'a Example>,
    /// Golden answers with the policy's samples.
    pub(super) contests: Vec<&'a Contest>,
    /// What the mean over `contests` counts in this step: with it the mean over an epoch's steps is the mean
    /// over all golden answers.
    pub(super) golden_weight: f64,
}

impl<'a> Order<'a> {
    pub(super) fn new(
        settings: &FitSettings,
        material: Material<'a>,
        seed: Seed,
    ) -> Result<Self, PreferenceError> {
        let contests = material.contests;
        let examples = if contests.is_empty() || material.apo.annotated {
            material.examples
        } else {
            &[]
        };
        let rows = if examples.is_empty() {
            contests.len()
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
            contests,
            batch,
            steps_in_epoch,
            steps: steps_in_epoch * settings.epochs as u64,
            seed,
        })
    }

    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// The pairs and the golden answers of step `step`, counted from 0.
    pub(super) fn step(&self, step: u64) -> StepRows<'a> {
        let (epoch, place) = (step / self.steps_in_epoch, step % self.steps_in_epoch);
        let examples = part(
            self.examples,
            place * self.batch..(place + 1) * self.batch,
            epoch,
            self.seed,
        );
        let count = self.contests.len() as u64;
        let (epoch, places, golden_weight) = if count < self.steps_in_epoch {
            // One each step, cycle after cycle, across epochs.
            let cycle = step / count.max(1);
            let place = step % count.max(1);
            (cycle, place..(place + 1).min(count), 1.0)
        } else {
            let share = |place: u64| place * count / self.steps_in_epoch;
            let places = share(place)..share(place + 1);
            let own = (places.end - places.start) * self.steps_in_epoch;
            (epoch, places, own as f64 / count as f64)
        };
        StepRows {
            examples,
            contests: part(self.contests, places, epoch, self.seed.derive(CONTESTS)),
            golden_weight,
        }
    }
}

/// The rows at these places of an epoch's order.
fn part<T>(rows: &[T], places: std::ops::Range<u64>, epoch: u64, seed: Seed) -> Vec<&T> {
    let count = rows.len() as u64;
    (places.start..places.end.min(count))
        .map(|place| &rows[shuffled(epoch * count + place, count, seed) as usize])
        .collect()
}

#[cfg(test)]
mod tests {
    use settings::resolve;

    use super::*;

    fn contest(id: u32) -> Contest {
        Contest {
            prompt: vec![id],
            golden: vec![0],
            samples: vec![vec![1]],
        }
    }

    fn example(id: u32) -> Example {
        Example {
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

    /// c multiplies the mean over all golden answers (Cheng et al. 2311.08045), however few or many they are
    /// beside the annotated pairs: 256 beside 1,875 steps too.
    #[test]
    fn the_mean_golden_term_has_its_whole_weight_in_every_epoch() {
        for (pairs, golden, batch) in [(60_000, 256, 32), (40, 5, 4), (10, 5, 4), (40, 33, 4)] {
            let settings = settings(batch);
            let examples: Vec<_> = (0..pairs).map(example).collect();
            let contests: Vec<_> = (0..golden).map(contest).collect();
            let material = Material {
                examples: &examples,
                contests: &contests,
                apo: &settings.apo,
            };
            let order = Order::new(&settings.fit, material, Seed(3)).expect("there are rows");
            let steps = order.steps_in_epoch;
            // The loss of a golden answer be its number: the mean is (golden - 1) / 2.
            let mut weight = 0.0;
            let mut mean = 0.0;
            for rows in (0..steps).map(|step| order.step(step)) {
                let losses = rows.contests.iter().map(|c| f64::from(c.prompt[0]));
                let of_step = losses.sum::<f64>() / rows.contests.len() as f64;
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
    fn every_row_is_read_once_an_epoch_and_golden_answers_are_spread() {
        let settings = settings(4);
        let examples: Vec<_> = (0..10).map(example).collect();
        let contests: Vec<_> = (0..5).map(contest).collect();
        let material = Material {
            examples: &examples,
            contests: &contests,
            apo: &settings.apo,
        };
        let order = Order::new(&settings.fit, material, Seed(3)).expect("there are rows");
        assert_eq!(order.steps(), 6);
        let (mut read, mut golden) = (Vec::new(), Vec::new());
        for step in 0..3 {
            let StepRows {
                examples, contests, ..
            } = order.step(step);
            assert!(
                contests.len() == 1 || contests.len() == 2,
                "{}",
                contests.len()
            );
            read.extend(examples.iter().map(|e| e.prompt[0]));
            golden.extend(contests.iter().map(|c| c.prompt[0]));
        }
        read.sort_unstable();
        golden.sort_unstable();
        assert_eq!((read, golden), ((0..10).collect(), (0..5).collect()));

        let mut without = settings.apo.clone();
        without.annotated = false;
        let material = Material {
            apo: &without,
            ..material
        };
        let order = Order::new(&settings.fit, material, Seed(3)).expect("there are rows");
        assert_eq!(order.steps(), 4);
        assert!((0..4).all(|step| {
            let rows = order.step(step);
            rows.examples.is_empty() && !rows.contests.is_empty()
        }));

        let none = Material {
            examples: &[],
            contests: &[],
            apo: &without,
        };
        assert!(matches!(
            Order::new(&settings.fit, none, Seed(3)),
            Err(PreferenceError::NothingToFit)
        ));
    }
}
