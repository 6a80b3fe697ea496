//! Which pairs and which golden answers make which step.

use dataset::shuffled;
use messages::Seed;
use settings::FitSettings;

use super::{Contest, Example, Material};
use crate::PreferenceError;

/// The golden answers are read in an order of their own.
const CONTESTS: u64 = 0x601d;

/// A reading of all pairs, as many epochs as the settings say, each in an order of its own. The golden
/// answers are spread over it evenly, so that each of them is read once an epoch too.
pub(super) struct Order<'a> {
    examples: &'a [Example],
    contests: &'a [Contest],
    batch: u64,
    steps_in_epoch: u64,
    steps: u64,
    seed: Seed,
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
    pub(super) fn step(&self, step: u64) -> (Vec<&'a Example>, Vec<&'a Contest>) {
        let (epoch, place) = (step / self.steps_in_epoch, step % self.steps_in_epoch);
        let examples = part(
            self.examples,
            place * self.batch..(place + 1) * self.batch,
            epoch,
            self.seed,
        );
        let count = self.contests.len() as u64;
        let share = |place: u64| place * count / self.steps_in_epoch;
        let contests = share(place)..share(place + 1);
        (
            examples,
            part(self.contests, contests, epoch, self.seed.derive(CONTESTS)),
        )
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

    #[test]
    fn every_row_is_read_once_an_epoch_and_golden_answers_are_spread() {
        let resolved = resolve(
            "[preference.fit]\nepochs = 2\ntrain_batch_size = 4",
            "t",
            &[],
        );
        let settings = resolved.expect("it resolves").settings.preference;
        let example = |id: u32| Example {
            prompt: vec![id],
            first: vec![0],
            second: vec![1],
            label: 1.0,
        };
        let contest = |id: u32| Contest {
            prompt: vec![id],
            golden: vec![0],
            samples: vec![vec![1]],
        };
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
            let (examples, contests) = order.step(step);
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
        assert!((0..4).all(|step| order.step(step).0.is_empty() && !order.step(step).1.is_empty()));

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
