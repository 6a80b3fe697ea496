//! Requests in progress with their ended completions.

use messages::Completion;

use crate::sampling::{Finished, Request};

/// Requests in progress.
#[derive(Debug, Default)]
pub struct ActiveRequests(Vec<ActiveRequest>);

#[derive(Debug)]
struct ActiveRequest {
    key: u64,
    prompt: Vec<u32>,
    completions: Vec<Option<Completion>>,
}

impl ActiveRequests {
    /// Whether no request is in progress.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of requests in progress.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds a request.
    pub fn begin(&mut self, request: &Request) {
        self.0.push(ActiveRequest {
            key: request.key,
            prompt: request.ids.clone(),
            completions: request.mixture_coefs.iter().map(|_| None).collect(),
        });
    }

    /// Records the ended completion at `index` of the request `key`.
    pub fn end(&mut self, key: u64, index: usize, completion: Completion) {
        if let Some(request) = self.0.iter_mut().find(|request| request.key == key) {
            request.completions[index] = Some(completion);
        }
    }

    /// Removes and returns the requests whose completions have all ended.
    pub fn take_finished(&mut self) -> Vec<Finished> {
        let has_ended =
            |request: &mut ActiveRequest| request.completions.iter().all(Option::is_some);
        let finished = self.0.extract_if(.., has_ended);
        let finished = finished.map(|request| Finished {
            key: request.key,
            prompt: request.prompt,
            completions: request.completions.into_iter().flatten().collect(),
        });
        finished.collect()
    }
}
