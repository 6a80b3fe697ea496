//! The playground's posts as prompts, each with a golden summary.

use dataset::shuffled;
use learner::{PromptRow, PromptSet};
use messages::Seed;
use playground::{Post, Vocabulary, held_out_post, held_out_seed, train_post, train_seed};

/// A new post for every training prompt, or the posts of annotated pairs in shuffled order.
pub(crate) struct PostPrompts {
    seed: u64,
    annotated: Vec<PromptRow>,
}

impl PostPrompts {
    /// `annotated` replaces the generated training prompts unless it is empty.
    pub(crate) fn new(seed: u64, annotated: Vec<PromptRow>) -> Self {
        Self { seed, annotated }
    }

    fn row(post: &Post, golden_seed: u64) -> PromptRow {
        let golden = post.golden(golden_seed);
        let answer = Vocabulary::shared().text(&golden[..golden.len() - 1]);
        PromptRow {
            ids: post.prompt_ids(),
            text: post.text(),
            dialogue: None,
            golden: Some(golden),
            answer: Some(answer),
            route: None,
        }
    }
}

impl PromptSet for PostPrompts {
    fn train(&self, index: u64) -> PromptRow {
        if !self.annotated.is_empty() {
            let position = shuffled(index, self.annotated.len() as u64, Seed(self.seed));
            return self.annotated[position as usize].clone();
        }
        Self::row(&train_post(self.seed, index), train_seed(self.seed, index))
    }

    fn held_out(&self, index: u64) -> PromptRow {
        Self::row(
            &held_out_post(self.seed, index),
            held_out_seed(self.seed, index),
        )
    }

    fn held_out_count(&self) -> Option<usize> {
        None
    }
}
