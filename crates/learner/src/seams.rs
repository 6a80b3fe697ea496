//! What is said, once for a file, of how chat templates print the answers that the file gives.

use std::path::Path;

use model::Seam;

/// How many answers follow their prompts otherwise than a sample would.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seams {
    shared: usize,
    given: usize,
}

impl Seams {
    /// One more row.
    pub fn count(&mut self, seam: Seam) {
        match seam {
            Seam::Asked => {}
            Seam::Shared => self.shared += 1,
            Seam::Given => self.given += 1,
        }
    }

    /// Logs what is not as with every template.
    pub fn say(self, path: &Path) {
        let path = path.display();
        if self.shared > 0 {
            tracing::warn!(
                %path,
                rows = self.shared,
                "the chat template prints the prompt otherwise where an answer follows: what both begin with is the prompt"
            );
        }
        if self.given > 0 {
            tracing::warn!(
                %path,
                rows = self.given,
                "the chat template does not print the answers as they are: they follow the generation prompt as given"
            );
        }
    }
}
