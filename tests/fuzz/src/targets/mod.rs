//! The parsers, each with valid inputs and what is done with a mutant.

mod dataset;
mod gguf;
mod jinja;
mod messages;
mod model;
mod run_view;
mod settings;
mod verdict;

use std::path::Path;

use system_tests::Mutator;

/// What became of an input.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It was parsed and used.
    Accepted,
    /// It was refused.
    Refused {
        /// The error.
        message: String,
        /// Names of which the error must contain one: the file, the key, the message's type.
        culprit: Vec<String>,
    },
    /// It broke a promise.
    Violation(String),
}

impl Outcome {
    /// The outcome of a parser whose error names `culprit`.
    fn of<T, E: std::fmt::Display>(result: Result<T, E>, culprit: &[&str]) -> Self {
        match result {
            Ok(_) => Self::Accepted,
            Err(error) => Self::Refused {
                message: error.to_string(),
                culprit: culprit.iter().map(|&name| name.to_owned()).collect(),
            },
        }
    }
}

/// Parses one mutant.
pub(crate) type Input = Box<dyn FnMut(&mut Mutator) -> Outcome>;

/// A parser.
pub(crate) struct Target {
    /// Name on the command line.
    pub(crate) name: &'static str,
    /// Makes the valid inputs; the folder is empty.
    pub(crate) prepare: fn(&Path) -> Input,
}

/// All parsers.
pub(crate) const TARGETS: [Target; 10] = [
    Target {
        name: "messages",
        prepare: messages::prepare,
    },
    Target {
        name: "settings",
        prepare: settings::prepare,
    },
    Target {
        name: "dataset",
        prepare: dataset::prepare,
    },
    Target {
        name: "jinja",
        prepare: jinja::prepare,
    },
    Target {
        name: "model",
        prepare: model::prepare,
    },
    Target {
        name: "gguf",
        prepare: gguf::prepare,
    },
    Target {
        name: "adapter",
        prepare: model::prepare_adapter,
    },
    Target {
        name: "reward",
        prepare: model::prepare_reward,
    },
    Target {
        name: "run-view",
        prepare: run_view::prepare,
    },
    Target {
        name: "verdict",
        prepare: verdict::prepare,
    },
];
