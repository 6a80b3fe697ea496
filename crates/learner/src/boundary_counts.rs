//! Counts, per file, how given answers join their prompts, and logs the exceptions.

use std::path::Path;

use model::AnswerBoundary;

/// Number of answers that do not follow the generation prompt as samples do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BoundaryCounts {
    common_prefix: usize,
    verbatim: usize,
}

impl BoundaryCounts {
    /// Counts a row.
    pub fn count(&mut self, boundary: AnswerBoundary) {
        match boundary {
            AnswerBoundary::GenerationPrompt => {}
            AnswerBoundary::CommonPrefix => self.common_prefix += 1,
            AnswerBoundary::Verbatim => self.verbatim += 1,
        }
    }

    /// Logs the counts of the file at `path`.
    pub fn log(self, path: &Path) {
        let path = path.display();
        if self.common_prefix > 0 {
            tracing::warn!(
                %path,
                rows = self.common_prefix,
                "the chat template renders the prompt differently when an answer follows: the common prefix of both renderings is the prompt"
            );
        }
        if self.verbatim > 0 {
            tracing::warn!(
                %path,
                rows = self.verbatim,
                "the chat template does not render the answers verbatim: they are appended to the generation prompt unrendered"
            );
        }
    }
}
