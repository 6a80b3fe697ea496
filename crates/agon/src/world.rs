//! What a run is about: the model it starts from, the prompts it asks, the judges that know it.

mod base;
mod bench;
mod gold;
mod words;

use std::{path::PathBuf, sync::Arc};

use learner::{Jsonl, PromptRow, PromptSet};
use messages::Seed;
use model::{DType, Device, LanguageModel, ModelFolder, Weights};
use playground::{Bandit, held_out_post, held_out_seed, train_post, train_seed};
use preference::{Judge, Matrix, Rules};
use settings::{DtypeSetting, JudgeSettings, PromptsSettings, Settings};

pub(crate) use base::{Base, playground_base};
pub(crate) use bench::{bench, gold_bench, judges, server};
pub(crate) use gold::Gold;
pub(crate) use words::texts;

/// The model at the start and the prompts of a run.
pub(crate) struct World {
    /// The folder of the policy at the start, which is the reference.
    pub(crate) folder: Arc<ModelFolder>,
    /// Its weights.
    pub(crate) weights: Weights,
    /// What is asked.
    pub(crate) set: Arc<dyn PromptSet>,
    /// What it cost to make the model, when this run made it.
    pub(crate) base: Option<Base>,
}

/// The device and the number format of the settings.
pub(crate) fn device(settings: &Settings) -> anyhow::Result<(Device, DType)> {
    let dtype = match settings.model.dtype {
        DtypeSetting::F32 => DType::F32,
        DtypeSetting::Bf16 => DType::BF16,
    };
    Ok((model::device(&settings.model.device)?, dtype))
}

/// Makes or loads everything the settings name. Making a base takes a while: it ends early when
/// `stopped` turns true.
pub(crate) fn build(settings: &Settings, stopped: &dyn Fn() -> bool) -> anyhow::Result<World> {
    let (device, dtype) = device(settings)?;
    let mut base = None;
    let path = match (&settings.model.path, &settings.prompts) {
        (Some(path), _) => path.clone(),
        (None, PromptsSettings::Bandit {}) => bandit(settings)?,
        (None, _) => {
            let made = playground_base(settings, stopped)?;
            let path = made.path.clone();
            base = Some(made);
            path
        }
    };
    let folder = ModelFolder::open(&path, settings.model.chat_template.as_deref())?;
    let weights = folder.weights(dtype, &device)?;
    let seed = Seed(settings.run.seed);
    let set: Arc<dyn PromptSet> = match &settings.prompts {
        PromptsSettings::Playground {} => {
            fits_playground(&folder)?;
            Arc::new(Posts { seed: seed.0 })
        }
        PromptsSettings::Bandit {} => Arc::new(OnePrompt),
        PromptsSettings::Jsonl(jsonl) => {
            let eos = folder.config.eos.first().copied();
            let longest = settings.actor.max_prompt_length;
            Arc::new(Jsonl::load(jsonl, seed, longest, &folder.tokenizer, eos)?)
        }
    };
    fits_positions(settings, &folder)?;
    Ok(World {
        folder: Arc::new(folder),
        weights,
        set,
        base,
    })
}

/// The judge of the settings, one that computes in this process.
pub(crate) fn judge(settings: &Settings) -> anyhow::Result<Box<dyn Judge>> {
    let judge = &settings.preference.judge;
    Ok(match judge {
        JudgeSettings::Gold { cycle } => Box::new(Gold::new(*cycle)),
        JudgeSettings::Matrix { matrix } => Box::new(Matrix::new(matrix.clone())?),
        JudgeSettings::Rule { temperature, rules } => Box::new(Rules::new(*temperature, rules)?),
        other => {
            return Err(crate::failure::Misuse(format!(
                "preference.judge.kind = {:?} is not built yet",
                other.name()
            ))
            .into());
        }
    })
}

/// The known gold preference of the world, where there is one.
pub(crate) fn gold(settings: &Settings) -> Option<Box<dyn Judge>> {
    let cycle = match settings.preference.judge {
        JudgeSettings::Gold { cycle } => cycle,
        _ => 0.0,
    };
    matches!(settings.prompts, PromptsSettings::Playground {})
        .then(|| Box::new(Gold::new(cycle)) as _)
}

/// A model whose probabilities over the arms are those of the settings, kept beside the bases.
fn bandit(settings: &Settings) -> anyhow::Result<PathBuf> {
    let probabilities = settings
        .model
        .reference_probabilities
        .as_deref()
        .unwrap_or_default();
    let bandit = Bandit::new(probabilities)?;
    base::kept(
        &settings.playground.base_dir,
        &("bandit", probabilities),
        |aside| {
            bandit.write_model(aside)?;
            Ok(())
        },
    )
}

/// The playground's judge reads token ids: they must mean the playground's words.
fn fits_playground(folder: &ModelFolder) -> anyhow::Result<()> {
    let vocabulary = playground::Vocabulary::shared();
    let foreign = (0..playground::VOCABULARY_SIZE as u32)
        .find(|&id| folder.tokenizer.token(id).as_deref() != vocabulary.word(id));
    match foreign {
        None => Ok(()),
        Some(id) => Err(model::ModelError::Tokenizer {
            path: folder.path.clone(),
            reason: format!(
                "token {id} is not the playground's {:?}; prompts.kind = \"playground\" needs a model with its vocabulary",
                vocabulary.word(id).unwrap_or_default()
            ),
        }
        .into()),
    }
}

fn fits_positions(settings: &Settings, folder: &ModelFolder) -> anyhow::Result<()> {
    let (actor, positions) = (&settings.actor, folder.config.max_positions);
    let longest_prompt = match settings.prompts {
        PromptsSettings::Jsonl(_) => actor.max_prompt_length,
        PromptsSettings::Playground {} | PromptsSettings::Bandit {} => 0,
    };
    if longest_prompt + actor.max_new_tokens > positions {
        return Err(crate::failure::Misuse(format!(
            "actor.max_prompt_length = {longest_prompt} and actor.max_new_tokens = {} together exceed the {positions} positions of {}: lower one of them",
            actor.max_new_tokens,
            folder.path.display()
        ))
        .into());
    }
    Ok(())
}

/// The playground's posts, a fresh one for every prompt.
struct Posts {
    seed: u64,
}

impl Posts {
    fn row(post: &playground::Post, golden_seed: u64) -> PromptRow {
        let golden = post.golden(golden_seed);
        let answer = playground::Vocabulary::shared().text(&golden[..golden.len() - 1]);
        PromptRow {
            ids: post.prompt_ids(),
            text: post.text(),
            golden: Some(golden),
            answer: Some(answer),
        }
    }
}

impl PromptSet for Posts {
    fn train(&self, index: u64) -> PromptRow {
        Self::row(&train_post(self.seed, index), train_seed(self.seed, index))
    }

    fn held_out(&self, index: u64) -> PromptRow {
        Self::row(
            &held_out_post(self.seed, index),
            held_out_seed(self.seed, index),
        )
    }
}

/// The one prompt of a bandit.
struct OnePrompt;

impl PromptSet for OnePrompt {
    fn train(&self, _index: u64) -> PromptRow {
        PromptRow {
            ids: vec![0],
            text: "which arm?".into(),
            golden: None,
            answer: None,
        }
    }

    fn held_out(&self, index: u64) -> PromptRow {
        self.train(index)
    }
}

/// A model with these weights.
pub(crate) fn language_model(
    folder: &ModelFolder,
    weights: &Weights,
) -> anyhow::Result<LanguageModel> {
    Ok(LanguageModel::new(folder.config.clone(), weights.clone())?)
}
