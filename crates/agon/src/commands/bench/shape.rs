//! What the benches of the model have in common: the model, the size of the work, and what it costs at least.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use model::{DType, Device, LanguageModel, ModelConfig, ModelFolder, Precision, StopTokens};

/// The model and how long it is measured.
#[derive(clap::Args)]
pub(super) struct Subject {
    /// The model: a Hugging Face folder.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// How long to measure, after one round that does not count.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

/// How numbers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Numbers {
    F32,
    Bf16,
    Int8,
}

impl Numbers {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// What is multiplied in training beside it: bytes are for writing alone.
    pub(super) fn of_training(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 | Self::Int8 => "bf16",
        }
    }

    /// Bytes to a weight.
    pub(super) fn bytes(self) -> f64 {
        match self {
            Self::F32 => 4.0,
            Self::Bf16 => 2.0,
            Self::Int8 => 1.0,
        }
    }
}

impl From<Numbers> for Precision {
    fn from(numbers: Numbers) -> Self {
        match numbers {
            Numbers::F32 => Self::F32,
            Numbers::Bf16 => Self::Bf16,
            Numbers::Int8 => Self::Int8,
        }
    }
}

impl Subject {
    /// The model in f32 on the CPU. No token ends a text, so that all completions have the same length.
    pub(super) fn open(&self) -> anyhow::Result<(ModelFolder, LanguageModel)> {
        let mut folder = ModelFolder::open(&self.model, None)?;
        folder.config.stops = StopTokens::default();
        let weights = folder.weights(DType::F32, &Device::Cpu)?;
        let model = LanguageModel::new(folder.config.clone(), weights)?;
        Ok((folder, model))
    }

    /// The median of what a round takes, in seconds, of at least three.
    pub(super) fn measure(
        &self,
        mut round: impl FnMut(u64) -> anyhow::Result<()>,
    ) -> anyhow::Result<f64> {
        round(0)?;
        let (clock, mut taken) = (Instant::now(), Vec::new());
        let time = Duration::from_secs_f64(self.seconds);
        while taken.len() < 3 || clock.elapsed() < time {
            let started = Instant::now();
            round(1 + taken.len() as u64)?;
            taken.push(started.elapsed().as_secs_f64());
        }
        taken.sort_by(f64::total_cmp);
        Ok(taken[taken.len() / 2])
    }
}

/// What a token costs in this model, in operations: two to a multiplication.
pub(super) struct Cost {
    /// In the blocks' linear maps.
    pub(super) blocks: f64,
    /// In the head.
    pub(super) head: f64,
    /// In attention, for every token that is looked at.
    pub(super) attention: f64,
}

impl Cost {
    pub(super) fn of(config: &ModelConfig) -> Self {
        let of = |numbers: usize| 2.0 * numbers as f64;
        let (queries, keys) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let block = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size);
        Self {
            blocks: of(config.layers * block),
            head: of(config.vocab_size * config.hidden_size),
            attention: of(2 * config.layers * queries),
        }
    }

    /// Multiplied numbers of the weights.
    pub(super) fn weights(&self) -> f64 {
        (self.blocks + self.head) / 2.0
    }
}

/// Token `index` of a stream of them, none of them special.
pub(super) fn token(config: &ModelConfig, index: usize) -> u32 {
    let ordinary = config.vocab_size.saturating_sub(3).max(1);
    let token = config.vocab_size - ordinary + (index * 7919) % ordinary;
    u32::try_from(token).unwrap_or_default()
}
