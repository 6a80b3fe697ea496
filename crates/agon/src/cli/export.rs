//! `agon export`: the policy of a checkpoint as a Hugging Face folder.
//!
//! A checkpoint is such a folder, or the PEFT folder of an adapter, together with the state of the run. An export leaves
//! out the state, and may change the dtype or merge the adapter. It does not lock the run, so that a run in progress can
//! be exported.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use hub::CancelToken;
use learner::LearnerError;
use messages::Digest;
use model::{
    AdapterFolder, DType, Device, LanguageModel, ModelError, ModelFolder, dtype_name, is_licence,
    save_policy,
};
use serde_json::Value;

use crate::cli::model_args::DtypeArgument;
use crate::{assembly::ModelLocation, exit_code::UsageError};

/// Files of a model; those that the exported one does not have are removed from the output.
const MODEL_FILES: [&str; 10] = [
    "config.json",
    "model.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// Export the policy of a run or a checkpoint as a Hugging Face folder.
///
/// Writes config.json, model.safetensors, the tokenizer's files and the licences of the model that was
/// trained (LICENSE, NOTICE, USE_POLICY and the like; no README, which describes that model), which
/// transformers and other programs load, and leaves out the optimiser and the state of the run. Of a run,
/// in progress or not, the newest checkpoint is exported. Reports the dtype, and prints the SHA-256 digest of
/// the weights in the format of `sha256sum -c`.
///
/// The checkpoint of an adapter (model.lora_rank) is written as a PEFT folder, which names its base model by the
/// Hub's name and commit or by a path; with --merge the adapter is merged into its model, which is written in
/// f32 unless --dtype is given.
///
/// With --average the moving average of the weights is written, which runs with learner.ema_decay keep.
///
/// Example: agon export --run runs/quickstart --output models/aligned --dtype bf16
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A run directory, or one of its checkpoints.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// The folder to write; must be missing or empty.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Dtype of the exported weights; that of the checkpoint by default.
    #[arg(long, value_enum)]
    dtype: Option<DtypeArgument>,
    /// Merge an adapter into its model.
    #[arg(long)]
    merge: bool,
    /// Export the moving average of the weights (learner.ema_decay) instead of the last ones.
    #[arg(long)]
    average: bool,
    /// Write into a folder that is not empty: a model in it is replaced, other files are kept.
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let checkpoint = checkpoint(&arguments.run)?;
    check_output(arguments, &checkpoint)?;
    let exported = ExportedPolicy::open(arguments, &checkpoint)?;
    if !exported.model.trained().is_finite()? {
        bail!(
            "failed to export {}: its weights are not all finite",
            checkpoint.display()
        );
    }
    exported.save(&arguments.output)?;
    remove_stale_files(&arguments.output, &exported)?;
    note!(
        "exported {} to {}: {}",
        checkpoint.display(),
        arguments.output.display(),
        exported.description()
    );
    let file = arguments.output.join(exported.weights_file());
    let bytes = fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
    out!("{}  {}", Digest::of(&bytes), file.display())?;
    Ok(ExitCode::SUCCESS)
}

/// The policy to write.
struct ExportedPolicy {
    /// The base model's folder; the checkpoint's if it holds a whole model.
    folder: ModelFolder,
    /// The checkpoint, if it holds an adapter.
    adapter: Option<AdapterFolder>,
    model: LanguageModel,
}

impl ExportedPolicy {
    fn open(arguments: &Arguments, checkpoint: &Path) -> anyhow::Result<Self> {
        if !AdapterFolder::is_at(checkpoint) {
            return Self::whole(arguments, checkpoint);
        }
        if arguments.dtype.is_some() && !arguments.merge {
            let advice = "an adapter is written in f32: --dtype needs --merge";
            return Err(UsageError(advice.into()).into());
        }
        let location = ModelLocation::of_folder(checkpoint.to_owned(), &CancelToken::never())?;
        let (folder, model) = location.policy(None, DType::F32, &Device::Cpu)?;
        let mut model = Self::selected(arguments, checkpoint, model)?;
        if arguments.merge {
            let dtype = arguments.dtype.map_or(DType::F32, DType::from);
            let merged = model.merged()?.to_dtype(dtype)?;
            model = LanguageModel::new(folder.config.clone(), merged)?;
        }
        Ok(Self {
            folder,
            adapter: Some(AdapterFolder::open(checkpoint)?),
            model,
        })
    }

    fn whole(arguments: &Arguments, checkpoint: &Path) -> anyhow::Result<Self> {
        if arguments.merge {
            return Err(UsageError(format!(
                "{} holds a whole model and no adapter: leave out --merge",
                checkpoint.display()
            ))
            .into());
        }
        let folder = ModelFolder::open(checkpoint, None)?;
        let dtype = arguments
            .dtype
            .map_or_else(|| saved_dtype(&folder.config.raw), DType::from);
        let weights = folder.weights(dtype, &Device::Cpu)?;
        let model = LanguageModel::new(folder.config.clone(), weights)?;
        let model = Self::selected(arguments, checkpoint, model)?;
        Ok(Self {
            folder,
            adapter: None,
            model,
        })
    }

    /// The policy of the checkpoint, or the moving average of its weights.
    fn selected(
        arguments: &Arguments,
        checkpoint: &Path,
        policy: LanguageModel,
    ) -> anyhow::Result<LanguageModel> {
        match arguments.average {
            true => average(checkpoint, &policy),
            false => Ok(policy),
        }
    }

    /// Saves the policy in the folder `output`, with the chat template that an adapter was trained with.
    fn save(&self, output: &Path) -> Result<(), ModelError> {
        save_policy(output, &self.folder, &self.model)?;
        match &self.adapter {
            Some(adapter) => adapter.save_tokenizer_files(output, &self.folder),
            None => Ok(()),
        }
    }

    /// Number of parameters and dtype, as text.
    fn description(&self) -> String {
        let (kind, dtype) = match self.model.adapter() {
            Some(_) => ("an adapter", DType::F32),
            None => ("a model", self.model.dtype()),
        };
        let count = self.model.trained().parameter_count();
        format!("{kind} of {count} parameters in {}", dtype_name(dtype))
    }

    /// Name of the file with the weights.
    fn weights_file(&self) -> &'static str {
        match self.model.adapter() {
            Some(_) => "adapter_model.safetensors",
            None => "model.safetensors",
        }
    }

    /// Whether the export includes the file `name`.
    fn has(&self, name: &str) -> Result<bool, ModelError> {
        let adapter = self.model.adapter().is_some();
        Ok(match name {
            "config.json" | "model.safetensors" => !adapter,
            "adapter_config.json" | "adapter_model.safetensors" => adapter,
            "model.safetensors.index.json" => false,
            other => match &self.adapter {
                Some(adapter) => adapter.saves(other, &self.folder)?,
                None => self.folder.path.join(other).exists(),
            },
        })
    }
}

/// The moving average in a checkpoint of `policy`.
///
/// # Errors
/// When there is none, or it cannot be read.
pub(super) fn average(checkpoint: &Path, policy: &LanguageModel) -> anyhow::Result<LanguageModel> {
    learner::checkpoint_average(checkpoint, policy)?.ok_or_else(|| {
        UsageError(format!(
            "{} holds no moving average of the weights: its run has learner.ema_decay = 0; leave out --average",
            checkpoint.display()
        ))
        .into()
    })
}

/// The newest checkpoint of the run in `path`, or `path` itself if it is a model's folder.
fn checkpoint(path: &Path) -> anyhow::Result<PathBuf> {
    let unreadable = |source| LearnerError::Unreadable {
        path: path.to_owned(),
        source,
    };
    fs::metadata(path).map_err(unreadable)?;
    let of_run = learner::newest_checkpoint_model(&path.join("checkpoints"))?;
    if let Some(checkpoint) = of_run {
        return Ok(checkpoint);
    }
    if path.join("model.safetensors").exists() || AdapterFolder::is_at(path) {
        return Ok(path.to_owned());
    }
    let reason = if path.join("model/config.json").exists()
        || AdapterFolder::is_at(&path.join("model"))
    {
        "it holds a preference model and no policy: name its folder `model` where a judge is named"
    } else if path.join("config.toml").exists() {
        "the run has saved no checkpoint yet; see learner.save_steps"
    } else {
        "it is neither a run directory (with checkpoints/step_N) nor a checkpoint (with model.safetensors or adapter_config.json)"
    };
    Err(ModelError::Malformed {
        path: path.to_owned(),
        reason: reason.into(),
    }
    .into())
}

/// Checks that nothing is overwritten without `--force`, and the checkpoint never.
fn check_output(arguments: &Arguments, checkpoint: &Path) -> anyhow::Result<()> {
    let output = &arguments.output;
    let entries = match fs::read_dir(output) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(error).with_context(|| format!("failed to write to {}", output.display()));
        }
    };
    let same = |path: &Path| path.canonicalize().ok();
    let message = if same(output) == same(checkpoint) {
        "is the checkpoint itself: name another folder with --output"
    } else if entries && !arguments.force {
        "is not empty: name another folder with --output, or add --force to replace the model in it"
    } else {
        return Ok(());
    };
    Err(UsageError(format!("{} {message}", output.display())).into())
}

/// Dtype named by a model configuration; f32 by default.
fn saved_dtype(config: &Value) -> DType {
    let name = config["dtype"].as_str().or(config["torch_dtype"].as_str());
    match name {
        Some("bfloat16") => DType::BF16,
        _ => DType::F32,
    }
}

/// Removes files of a replaced model from `output`, licences included, that the exported one does not have.
fn remove_stale_files(output: &Path, exported: &ExportedPolicy) -> anyhow::Result<()> {
    let entries = fs::read_dir(output)
        .with_context(|| format!("failed to read {}", output.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    for name in entries.filter(|name| MODEL_FILES.contains(&name.as_str()) || is_licence(name)) {
        let path = output.join(&name);
        if path.is_file() && !exported.has(&name)? {
            fs::remove_file(&path)
                .with_context(|| format!("failed to remove {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use playground::Bandit;
    use serde_json::json;

    use super::*;

    /// A run with checkpoints of these steps, each a bandit's model.
    fn run_with(steps: &[u64]) -> tempfile::TempDir {
        let run = tempfile::tempdir().unwrap();
        fs::write(run.path().join("config.toml"), "").unwrap();
        fs::create_dir(run.path().join("checkpoints")).unwrap();
        for step in steps {
            let folder = run.path().join(format!("checkpoints/step_{step}"));
            fs::create_dir(&folder).unwrap();
            Bandit::new(&[0.5, 0.5])
                .unwrap()
                .write_model(&folder)
                .unwrap();
            fs::write(folder.join("state.json"), "{}").unwrap();
        }
        run
    }

    fn arguments(run: &Path, output: &Path, force: bool) -> Arguments {
        Arguments {
            run: run.to_owned(),
            output: output.to_owned(),
            dtype: None,
            merge: false,
            average: false,
            force,
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_newest_checkpoint_or_the_named_one_is_exported() {
        let run = run_with(&[2, 10, 9]);
        let newest = run.path().join("checkpoints/step_10");
        assert_eq!(checkpoint(run.path()).unwrap(), newest);
        assert_eq!(checkpoint(&newest).unwrap(), newest);
        let (empty, unsaved) = (tempfile::tempdir().unwrap(), run_with(&[]));
        let missing = empty.path().join("missing");
        let fitted = run_with(&[]);
        fs::create_dir(fitted.path().join("model")).unwrap();
        fs::write(fitted.path().join("model/config.json"), "{}").unwrap();
        let cases = [
            (fitted.path(), "it holds a preference model and no policy"),
            (missing.as_path(), "failed to read"),
            (unsaved.path(), "the run has saved no checkpoint yet"),
            (empty.path(), "neither a run directory"),
        ];
        for (path, expected) in cases {
            let refused = checkpoint(path).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
    }

    #[test]
    fn an_export_holds_no_state_of_the_run() {
        let run = run_with(&[1]);
        let licence = run.path().join("checkpoints/step_1/LICENSE");
        fs::write(licence, "as you like").unwrap();
        let target = tempfile::tempdir().unwrap();
        let output = target.path().join("made/here");
        super::run(&arguments(run.path(), &output, false)).unwrap();
        let files = [
            "LICENSE",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        assert_eq!(names(&output), files);
        let read = |folder: &Path| {
            let folder = ModelFolder::open(folder, None).unwrap();
            folder
                .weights(DType::F32, &Device::Cpu)
                .unwrap()
                .digest()
                .unwrap()
        };
        assert_eq!(read(&output), read(&run.path().join("checkpoints/step_1")));
    }

    #[test]
    fn an_adapter_is_exported_with_its_chat_template() {
        let base = tempfile::tempdir().unwrap();
        Bandit::new(&[0.5, 0.5])
            .unwrap()
            .write_model(base.path())
            .unwrap();
        let folder = ModelFolder::open(base.path(), None).unwrap();
        let weights = folder.weights(DType::F32, &Device::Cpu).unwrap();
        let model = LanguageModel::new(folder.config.clone(), weights).unwrap();
        let config = model::LoraConfig::new(2, 4.0, 0.0, &["all-linear".to_owned()]);
        let seed = messages::Seed(1);
        let adapter = model::Adapter::fresh(config, &folder.config, seed, &Device::Cpu).unwrap();
        let adapter = adapter.with_base_model(folder.base_model.clone());
        let model = model.with_adapter(adapter).unwrap();
        let template = base.path().join("given.jinja");
        fs::write(&template, "trained {{ messages[0].content }}").unwrap();
        let trained = ModelFolder::open(base.path(), Some(&template)).unwrap();
        let checkpoint = tempfile::tempdir().unwrap();
        save_policy(checkpoint.path(), &trained, &model).unwrap();
        let generation = r#"{"temperature":0.5,"eos_token_id":[0]}"#;
        fs::write(checkpoint.path().join("generation_config.json"), generation).unwrap();
        for merge in [false, true] {
            let target = tempfile::tempdir().unwrap();
            let stale = target.path().join("special_tokens_map.json");
            fs::write(&stale, "{}").unwrap();
            let mut arguments = arguments(checkpoint.path(), target.path(), true);
            arguments.merge = merge;
            super::run(&arguments).unwrap();
            let read = |name: &str| fs::read_to_string(target.path().join(name)).unwrap();
            let template = fs::read_to_string(&template).unwrap();
            assert_eq!(read("chat_template.jinja"), template, "merge: {merge}");
            let saved = read("generation_config.json");
            assert!(saved.contains("temperature"), "merge: {merge}");
            assert!(!stale.exists(), "merge: {merge}");
        }
    }

    #[test]
    fn the_average_is_exported_if_the_run_has_one() {
        let run = run_with(&[1]);
        let checkpoint = run.path().join("checkpoints/step_1");
        let target = tempfile::tempdir().unwrap();
        let mut arguments = arguments(run.path(), target.path(), true);
        arguments.average = true;
        let refused = super::run(&arguments).unwrap_err();
        assert!(refused.is::<UsageError>(), "{refused}");
        assert!(refused.to_string().contains("learner.ema_decay = 0"));
        let other = tempfile::tempdir().unwrap();
        let bandit = Bandit::new(&[0.25, 0.75]).unwrap();
        bandit.write_model(other.path()).unwrap();
        let weights = |folder: &Path| {
            let folder = ModelFolder::open(folder, None).unwrap();
            folder.weights(DType::F32, &Device::Cpu).unwrap()
        };
        let average = weights(other.path()).to_blob().unwrap();
        fs::write(checkpoint.join("average.safetensors"), average).unwrap();
        super::run(&arguments).unwrap();
        let digest = |folder: &Path| weights(folder).digest().unwrap();
        assert_eq!(digest(target.path()), digest(other.path()));
        assert_ne!(digest(target.path()), digest(&checkpoint));
    }

    #[test]
    fn the_dtype_can_be_changed() {
        let run = run_with(&[1]);
        let target = tempfile::tempdir().unwrap();
        let mut arguments = arguments(run.path(), target.path(), false);
        arguments.dtype = Some(DtypeArgument::Bf16);
        super::run(&arguments).unwrap();
        let folder = ModelFolder::open(target.path(), None).unwrap();
        assert_eq!(saved_dtype(&folder.config.raw), DType::BF16);
        let size = |folder: &Path| {
            fs::metadata(folder.join("model.safetensors"))
                .unwrap()
                .len()
        };
        let whole = size(&run.path().join("checkpoints/step_1"));
        assert!(
            size(target.path()) < whole * 2 / 3,
            "half the bytes of tensors, the same header"
        );
    }

    #[test]
    fn a_folder_that_is_not_empty_is_replaced_only_if_forced() {
        let (run, target) = (run_with(&[1]), tempfile::tempdir().unwrap());
        for name in [
            "notes.txt",
            "LICENSE.txt",
            "chat_template.jinja",
            "model.safetensors.index.json",
        ] {
            fs::write(target.path().join(name), "{}").unwrap();
        }
        let before = names(target.path());
        let refused = super::run(&arguments(run.path(), target.path(), false)).unwrap_err();
        assert!(
            refused.is::<UsageError>() && refused.to_string().contains("--force"),
            "{refused}"
        );
        assert_eq!(names(target.path()), before);

        super::run(&arguments(run.path(), target.path(), true)).unwrap();
        let files = [
            "config.json",
            "model.safetensors",
            "notes.txt",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        assert_eq!(names(target.path()), files);
    }

    #[test]
    fn a_checkpoint_cannot_be_its_own_output() {
        let run = run_with(&[1]);
        let output = run.path().join("checkpoints/step_1");
        let refused = super::run(&arguments(run.path(), &output, true)).unwrap_err();
        assert!(
            refused.to_string().contains("is the checkpoint itself"),
            "{refused}"
        );
    }

    #[test]
    fn the_dtype_of_a_configuration() {
        let cases = [
            (json!({"torch_dtype": "bfloat16"}), DType::BF16),
            (
                json!({"dtype": "bfloat16", "torch_dtype": "float32"}),
                DType::BF16,
            ),
            (json!({"torch_dtype": "float32"}), DType::F32),
            (json!({}), DType::F32),
        ];
        for (config, expected) in cases {
            assert_eq!(saved_dtype(&config), expected, "{config}");
        }
    }
}
