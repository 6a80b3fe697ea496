//! The completions of each prompt, as they end.

use messages::Completion;

use super::{Finished, Request};

/// The prompts that are being answered.
#[derive(Debug, Default)]
pub struct Groups(Vec<Group>);

#[derive(Debug)]
struct Group {
    key: u64,
    completions: Vec<Option<Completion>>,
}

impl Groups {
    /// Whether no prompt is being answered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many prompts are being answered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// A prompt is being answered from now on.
    pub fn begin(&mut self, request: &Request) {
        self.0.push(Group {
            key: request.key,
            completions: request.mixture_coefs.iter().map(|_| None).collect(),
        });
    }

    /// The completion at `index` of the prompt `key` has ended.
    pub fn end(&mut self, key: u64, index: usize, completion: Completion) {
        if let Some(group) = self.0.iter_mut().find(|group| group.key == key) {
            group.completions[index] = Some(completion);
        }
    }

    /// Takes out the prompts whose completions have all ended.
    pub fn take_finished(&mut self) -> Vec<Finished> {
        let has_ended = |group: &mut Group| group.completions.iter().all(Option::is_some);
        let finished = self.0.extract_if(.., has_ended);
        let finished = finished.map(|group| Finished {
            key: group.key,
            completions: group.completions.into_iter().flatten().collect(),
        });
        finished.collect()
    }
}
