//! What a run is about: the model it starts from, the prompts it asks, the judges that know it.

mod adapter;
mod base;
mod bench;
mod conditions;
mod game;
mod gold;
mod judges;
mod local_chat;
mod pairs;
mod preference;
mod preflight;
mod styles;
mod words;
mod writer;

use std::{path::PathBuf, sync::Arc};

use ::preference::Judge;
use dataset::shuffled;
use learner::{Limits, PromptFiles, PromptRow, PromptSet};
use messages::Seed;
use model::{Adapter, DType, Device, LanguageModel, ModelConfig, ModelFolder, Weights};
use playground::{Bandit, held_out_post, held_out_seed, train_post, train_seed};
use settings::{
    DatasetPrompts, DtypeSetting, JudgeSettings, ObjectiveSettings, PairsSettings,
    PlaygroundGolden, PromptsSettings, Settings,
};

use crate::{failure::Misuse, model_hub};

pub(crate) use adapter::{adapter, adapter_shape, fresh_adapter};
pub(crate) use base::{Base, playground_base};
pub(crate) use bench::{bench, gold_bench, seats, server};
pub(crate) use conditions::conditions;
pub(crate) use game::{Judging, rounds, version};
pub(crate) use gold::Gold;
pub(crate) use judges::{JudgeSource, Judged};
pub(crate) use pairs::{Annotated, LeftOut, annotated};
use pairs::{GeneratedPair, generated};
pub(crate) use preference::{
    Opened, Trunk, fit_adapter, preference_model, reward_folder, share_tokenizer,
};
pub(crate) use preflight::{Finding, Part, Preflight};
pub(crate) use styles::{StyleComparison, styles};
pub(crate) use words::texts;
pub(crate) use writer::{WriterParts, is_built, writer};

/// The model at the start and the prompts of a run.
pub(crate) struct World {
    /// The folder of the reference.
    pub(crate) folder: Arc<ModelFolder>,
    /// Its weights.
    pub(crate) weights: Weights,
    /// What is trained beside them, if not they themselves.
    adapter: Option<Adapter>,
    /// The folder that it was read from, if it is not a fresh one.
    pub(crate) adapter_folder: Option<PathBuf>,
    /// What is asked.
    pub(crate) set: Arc<dyn PromptSet>,
    /// What it cost to make the model, when this run made it.
    pub(crate) base: Option<Base>,
}

impl World {
    /// The model at the start.
    pub(crate) fn start(&self) -> (&ModelFolder, &Weights) {
        (&self.folder, &self.weights)
    }

    /// Whose completions the judge of the run reads.
    pub(crate) fn judged(&self) -> Judged<'_> {
        Judged::Policy(&self.folder, &self.weights)
    }

    /// The policy at the start: the reference, with the adapter beside it where one is trained. All
    /// copies share the weights.
    pub(crate) fn policy(&self) -> anyhow::Result<LanguageModel> {
        policy(&self.folder, &self.weights, self.adapter.clone())
    }
}

/// What is said of a model without stop tokens.
pub(crate) const ENDLESS: &str = "no token ends a completion: each goes on to its limit of new tokens; name one as eos_token in tokenizer_config.json or eos_token_id in generation_config.json";

/// Warns of a model that does not say which token ends a completion.
pub(crate) fn warn_of_endless(folder: &ModelFolder) {
    if folder.config.stops.is_empty() {
        tracing::warn!(model = %folder.path.display(), "{ENDLESS}");
    }
}

/// The device and the number format of the settings.
pub(crate) fn device(settings: &Settings) -> anyhow::Result<(Device, DType)> {
    let device = model::device(&settings.model.device)?;
    Ok((device, dtype(settings.model.dtype)))
}

/// The number format that a setting names.
pub(crate) fn dtype(setting: DtypeSetting) -> DType {
    match setting {
        DtypeSetting::F32 => DType::F32,
        DtypeSetting::Bf16 => DType::BF16,
    }
}

/// The policy at the start, which is the reference.
pub(crate) struct Start {
    /// Its folder.
    pub(crate) folder: ModelFolder,
    /// Its weights.
    pub(crate) weights: Weights,
    /// What it cost to make it, when it was made just now.
    base: Option<Base>,
}

impl Start {
    /// Loads the policy that the settings name, or makes it. That may take a while: it ends early when
    /// `stopped` turns true.
    pub(crate) fn open(settings: &Settings, stopped: &dyn Fn() -> bool) -> anyhow::Result<Self> {
        let mut base = None;
        let path = match (&settings.model.path, &settings.prompts) {
            (Some(source), _) => model_hub::folder(source, stopped)?,
            (None, PromptsSettings::Bandit {}) => bandit(settings)?,
            (None, _) => {
                let made = playground_base(settings, stopped)?;
                let path = made.path.clone();
                base = Some(made);
                path
            }
        };
        let (device, dtype) = device(settings)?;
        let folder = ModelFolder::open(&path, settings.model.chat_template.as_deref())?;
        if settings.model.path.is_some() {
            warn_of_endless(&folder);
        }
        let weights = folder.weights(dtype, &device)?;
        Ok(Self {
            folder,
            weights,
            base,
        })
    }

    /// Both, for whoever needs no more.
    pub(crate) fn policy(&self) -> (&ModelFolder, &Weights) {
        (&self.folder, &self.weights)
    }
}

/// Makes or loads the policy and the prompts that the settings name, unless the prompts were `read` already.
/// Making takes a while: it ends early when `stopped` turns true.
pub(crate) fn build(
    settings: &Settings,
    read: Option<Arc<dyn PromptSet>>,
    stopped: &dyn Fn() -> bool,
) -> anyhow::Result<World> {
    is_built(settings)?;
    let Start {
        folder,
        weights,
        base,
    } = Start::open(settings, stopped)?;
    let set = match read {
        Some(set) => set,
        None => prompts(settings, (&folder, &weights), stopped)?,
    };
    fits_positions(settings, &folder.config)?;
    let adapter_folder = adapter_folder(settings, stopped)?;
    let adapter = adapter(settings, (&folder, &weights), adapter_folder.as_deref())?;
    Ok(World {
        folder: Arc::new(folder),
        weights,
        adapter,
        adapter_folder,
        set,
        base,
    })
}

/// The folder of the adapter that the settings start from, if they name one; fetched first where it is the hub's.
pub(crate) fn adapter_folder(
    settings: &Settings,
    stopped: &dyn Fn() -> bool,
) -> anyhow::Result<Option<PathBuf>> {
    let source = settings.model.adapter.as_ref();
    Ok(source
        .map(|source| model_hub::folder(source, stopped))
        .transpose()?)
}

/// What the settings ask, as tokens of this policy.
pub(crate) fn prompts(
    settings: &Settings,
    (folder, weights): (&ModelFolder, &Weights),
    stopped: &dyn Fn() -> bool,
) -> anyhow::Result<Arc<dyn PromptSet>> {
    let seed = Seed(settings.run.seed);
    Ok(match &settings.prompts {
        PromptsSettings::Playground { golden } => {
            fits_playground(folder)?;
            let pairs = &settings.preference.fit.pairs;
            let chosen = match (golden, pairs) {
                (PlaygroundGolden::Chosen, PairsSettings::Playground(how)) => {
                    let pairs = generated(settings, *how, (folder, weights), stopped)?;
                    pairs.into_iter().map(GeneratedPair::chosen).collect()
                }
                _ => Vec::new(),
            };
            Arc::new(Posts {
                seed: seed.0,
                chosen,
            })
        }
        PromptsSettings::Bandit {} => Arc::new(OnePrompt),
        PromptsSettings::Dataset(dataset) => Arc::new(prompt_files(settings, dataset, folder)?),
    })
}

/// The prompts of files, as tokens of the policy in this folder.
fn prompt_files(
    settings: &Settings,
    dataset: &DatasetPrompts,
    folder: &ModelFolder,
) -> anyhow::Result<PromptFiles> {
    // Golden answers are read by the policy, or beside its samples by the preference model.
    let reads_golden = matches!(settings.learner.objective, ObjectiveSettings::Rpo { .. })
        || settings.preference.apo.refresh_steps > 0;
    let limits = Limits {
        prompt: settings.actor.max_prompt_length,
        with_golden: reads_golden.then_some(folder.config.max_positions),
    };
    let seed = Seed(settings.run.seed);
    Ok(PromptFiles::load(dataset, seed, limits, &folder.tokenizer)?)
}

/// The known gold preference of the world, where there is one.
pub(crate) fn gold(settings: &Settings) -> Option<Box<dyn Judge>> {
    let cycle = match settings.preference.judge {
        JudgeSettings::Gold { cycle } => cycle,
        _ => 0.0,
    };
    matches!(settings.prompts, PromptsSettings::Playground { .. })
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

/// Whether the longest prompt and the longest completion fit the model's positions together, and the
/// playground's prompts the actors' slots.
///
/// # Errors
/// When they do not.
pub(crate) fn fits_positions(settings: &Settings, config: &ModelConfig) -> Result<(), Misuse> {
    let (actor, positions) = (&settings.actor, config.max_positions);
    if let PromptsSettings::Playground { .. } = settings.prompts
        && actor.max_prompt_length < playground::LONGEST_PROMPT
    {
        return Err(Misuse(format!(
            "actor.max_prompt_length = {} is less than the {} tokens of the playground's longest post: raise it",
            actor.max_prompt_length,
            playground::LONGEST_PROMPT
        )));
    }
    let prompt = match settings.prompts {
        PromptsSettings::Dataset(_) => actor.max_prompt_length,
        PromptsSettings::Playground { .. } | PromptsSettings::Bandit {} => 0,
    };
    if prompt.saturating_add(actor.max_new_tokens) <= positions {
        return Ok(());
    }
    Err(Misuse(format!(
        "actor.max_prompt_length = {prompt} and actor.max_new_tokens = {} exceed the model's {} positions: lower one of them",
        actor.max_new_tokens, config.max_positions,
    )))
}

/// The playground's posts: a fresh one for every prompt, or those of annotated pairs, in turn.
struct Posts {
    seed: u64,
    chosen: Vec<PromptRow>,
}

impl Posts {
    fn row(post: &playground::Post, golden_seed: u64) -> PromptRow {
        let golden = post.golden(golden_seed);
        let answer = playground::Vocabulary::shared().text(&golden[..golden.len() - 1]);
        PromptRow {
            ids: post.prompt_ids(),
            text: post.text(),
            dialogue: None,
            golden: Some(golden),
            answer: Some(answer),
        }
    }
}

impl PromptSet for Posts {
    fn train(&self, index: u64) -> PromptRow {
        if !self.chosen.is_empty() {
            let place = shuffled(index, self.chosen.len() as u64, Seed(self.seed));
            return self.chosen[place as usize].clone();
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

/// The one prompt of a bandit.
struct OnePrompt;

impl PromptSet for OnePrompt {
    fn train(&self, _index: u64) -> PromptRow {
        PromptRow {
            ids: vec![0],
            text: "which arm?".into(),
            dialogue: None,
            golden: None,
            answer: None,
        }
    }

    fn held_out(&self, index: u64) -> PromptRow {
        self.train(index)
    }

    /// What is sampled is the answers to the one prompt, each with a seed of its own.
    fn held_out_count(&self) -> Option<usize> {
        None
    }
}

/// The policy of these weights: themselves, or with an adapter beside them.
pub(crate) fn policy(
    folder: &ModelFolder,
    weights: &Weights,
    adapter: Option<Adapter>,
) -> anyhow::Result<LanguageModel> {
    let reference = language_model(folder, weights)?;
    Ok(match adapter {
        Some(adapter) => reference.with_adapter(adapter)?,
        None => reference,
    })
}

/// A model with these weights.
pub(crate) fn language_model(
    folder: &ModelFolder,
    weights: &Weights,
) -> anyhow::Result<LanguageModel> {
    Ok(LanguageModel::new(folder.config.clone(), weights.clone())?)
}
