//! `agon score --reward` against the scores that transformers gave, and what it refuses.

use std::path::{Path, PathBuf};

use house::{Ended, Workplace, config, shared};
use playground::Bandit;
use serde_json::{Value, json};

fn score(workplace: &Workplace, model: &Path, rows: &str) -> Ended {
    let file = workplace.write("rows.jsonl", rows);
    let (model, file) = (model.display().to_string(), file.display().to_string());
    workplace.run(&["score", "--reward", "--model", &model, "--input", &file])
}

fn scores(ended: Ended) -> Vec<f64> {
    let answers = ended.succeeded().json_lines();
    let score = |answer: &Value| answer["score"].as_f64().expect("every row has a score");
    answers.iter().map(score).collect()
}

#[test]
fn every_kind_of_reward_model_scores_as_transformers_does() {
    let workplace = Workplace::new();
    for name in [
        "random-llama-reward",
        "random-qwen2-reward",
        "random-deberta-reward",
    ] {
        let Some(model) = shared("reward_score", &format!("data/models/{name}")) else {
            return;
        };
        let reference = std::fs::read(model.join("reference.json")).expect("a reference");
        let reference: Value = serde_json::from_slice(&reference).expect("the reference is JSON");
        let numbers = |key: &str| -> Vec<Vec<usize>> {
            serde_json::from_value(reference[key].clone()).expect("rows of numbers")
        };
        // Padding stands on the right.
        let rows = numbers("ids").into_iter().zip(numbers("attention_mask"));
        let rows = rows.map(|(ids, mask)| json!({"ids": ids[..mask.iter().sum()]}).to_string());
        let rows: Vec<String> = rows.collect();
        let found = scores(score(&workplace, &model, &rows.join("\n")));
        let expected: Vec<f64> =
            serde_json::from_value(reference["scores"].clone()).expect("scores");
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(&expected) {
            assert!((f - e).abs() < 1e-3, "{name}: {f} is not {e}");
        }
    }
}

#[test]
fn a_completion_is_scored_after_its_prompt() {
    let Some(decoder) = shared("reward_text", "data/models/random-llama-reward") else {
        return;
    };
    let Some(encoder) = shared("reward_text", "data/models/random-deberta-reward") else {
        return;
    };
    let workplace = Workplace::new();
    let text = json!({"prompt": "Tom and", "completion": " his dog"}).to_string();
    let ids = json!({"ids": [1, 274, 287, 269, 345, 400, 428]}).to_string();
    let found = scores(score(&workplace, &decoder, &format!("{text}\n{ids}\n")));
    // Pooled over the last token alone, it is all one where the prompt ends.
    assert!((found[0] - found[1]).abs() < 1e-5, "{found:?}");
    let dialogue = json!({
        "prompt": [{"role": "user", "content": "Tom and"}], "completion": " his dog"
    });
    let found = scores(score(
        &workplace,
        &encoder,
        &format!("{text}\n{dialogue}\n{ids}\n"),
    ));
    assert_eq!(found[0], found[1]);
    assert!(
        (found[0] - found[2]).abs() > 1e-6,
        "the new line was lost: {found:?}"
    );
}

#[test]
fn a_model_of_the_other_kind_is_refused_with_the_remedy() {
    let (Some(policy), Some(reward)) = (
        shared("reward_kind", "data/models/stories260K"),
        shared("reward_kind", "data/models/random-llama-reward"),
    ) else {
        return;
    };
    let workplace = Workplace::new();
    let rows = "{\"ids\": [1, 2]}\n";
    let says = ["LlamaForCausalLM", "ModernBertForSequenceClassification"];
    score(&workplace, &policy, rows)
        .check(3, &says)
        .without_panic();
    let file = workplace.write("rows.jsonl", rows).display().to_string();
    let reward = reward.display().to_string();
    workplace
        .run(&["score", "--model", &reward, "--input", &file])
        .check(2, &["is a reward model", "--reward"])
        .without_panic();
}

/// A preference model of a model of two words, fitted with these settings: its folder.
fn fitted(workplace: &Workplace, name: &str, sets: &[&str]) -> PathBuf {
    let trunk = workplace.path("trunk");
    std::fs::create_dir_all(&trunk).expect("a folder in a temporary directory");
    let bandit = Bandit::new(&[0.7, 0.3]).expect("two probabilities");
    bandit.write_model(&trunk).expect("it is written");
    // Prompts differ, so that some can be held out.
    let pairs = ["arm0", "arm1"].map(|prompt| {
        format!("{{\"prompt\": {prompt:?}, \"chosen\": \" arm1\", \"rejected\": \" arm0\"}}\n")
    });
    let pairs = workplace.write("pairs.jsonl", pairs.concat().repeat(4));
    let prompts = workplace.write("prompts.jsonl", "{\"prompt\": \"arm0\"}\n".repeat(2));
    let run = workplace.path(name);
    let mut words = vec!["fit-preference".to_owned(), default_config()];
    words.extend(["--run-dir".into(), run.display().to_string()]);
    let own = [
        format!("model.path={trunk:?}"),
        "prompts.kind=dataset".into(),
        format!("prompts.path={prompts:?}"),
        "prompts.held_out=1".into(),
        "actor.max_prompt_length=4".into(),
        "actor.max_new_tokens=4".into(),
        "preference.judge.kind=bradley-terry".into(),
        "preference.fit.pairs.kind=dataset".into(),
        format!("preference.fit.pairs.path={pairs:?}"),
        "preference.fit.validation=0.5".into(),
    ];
    let sets = sets.iter().map(|&set| set.to_owned());
    for set in own.into_iter().chain(sets) {
        words.extend(["--set".into(), set]);
    }
    workplace.run(&words).succeeded();
    run.join("model")
}

fn default_config() -> String {
    config("default.toml").display().to_string()
}

fn json_of(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn a_fitted_model_bears_the_names_of_those_who_can_compute_it() {
    let workplace = Workplace::new();
    let plain = [
        "preference.fit.pooling=last",
        "preference.fit.likelihood=false",
    ];
    let beside = ["preference.fit.lora_rank=2"];
    let pairwise = ["preference.fit.head=pairwise"];
    let rows = "{\"ids\": [0, 1]}\n";
    for (name, sets, is_plain) in [
        ("default", Vec::new(), false),
        ("plain", plain.to_vec(), true),
        ("plain-pairwise", [plain, [pairwise[0]; 2]].concat(), false),
        ("adapter", beside.to_vec(), false),
        ("plain-adapter", [&plain[..], &beside].concat(), true),
    ] {
        let model = fitted(&workplace, name, &sets);
        let adapter = model.join("adapter_config.json");
        if adapter.exists() {
            let kind = if is_plain { "LORA" } else { "AGON_LORA" };
            assert_eq!(json_of(&adapter)["peft_type"], kind, "{name}");
        } else {
            let config = json_of(&model.join("config.json"));
            let (architecture, kind) = match is_plain {
                true => ("LlamaForSequenceClassification", "llama"),
                false => ("AgonLlamaRewardModel", "agon_llama"),
            };
            assert_eq!(config["architectures"], json!([architecture]), "{name}");
            assert_eq!(config["model_type"], kind, "{name}");
        }
        // Whatever it bears, it is read here.
        let ended = score(&workplace, &model, rows);
        if name == "plain-pairwise" {
            ended.check(3, &["the model is pairwise"]);
        } else {
            assert_eq!(scores(ended).len(), 1, "{name}");
        }
    }
}

/// The judge's p of every pair of a run that was trained on, by the prompt's last user turn or text; and its
/// samples.
fn judged(
    workplace: &Workplace,
    case: &Path,
    policy: &str,
    prompts: &str,
    more: &[&str],
) -> Vec<Value> {
    let path = |name: &str| format!("{:?}", case.join(name).display().to_string());
    let config = case.join("rm.toml").display().to_string();
    let run = workplace.path("judged").display().to_string();
    let sets = [
        format!("model.path={}", path(policy)),
        format!("prompts.path={}", path(prompts)),
        format!("preference.judge.path={}", path("rw-other")),
    ];
    let mut call = vec!["train", &config, "--run-dir", &run];
    let sets = sets.iter().map(String::as_str).chain(more.iter().copied());
    call.extend(sets.flat_map(|set| ["--set", set]));
    workplace.run(&call).succeeded();
    let samples = workplace.run(&["samples", &run, "--json", "--limit", "100"]);
    let samples = samples.succeeded().json_lines().into_iter();
    samples.filter(|row| row["purpose"] == "train").collect()
}

/// That the judge's p are these, by what the prompt's text ends with.
fn are_judged(rows: &[Value], expected: &[(&str, f64)]) {
    for (ending, p) in expected {
        let asked = |row: &&Value| {
            row["prompt"]
                .as_str()
                .is_some_and(|text| text.contains(ending))
        };
        let row = rows
            .iter()
            .find(asked)
            .unwrap_or_else(|| panic!("no {ending:?} in {rows:?}"));
        let found = row["p"].as_f64().expect("a label");
        assert!(
            (found - p).abs() < 5e-5,
            "{ending}: {found} is not {p}: {row}"
        );
    }
}

/// The numbers are transformers': σ of the difference of `LlamaForSequenceClassification`'s scores of
/// `apply_chat_template(messages, add_generation_prompt=True)`, the completion and the end token.
const OWN_TEMPLATE: [(&str, f64); 4] = [
    ("The cat sat on", 0.444_73),
    ("Once upon a time", 0.519_53),
    ("Lily had a red", 0.560_63),
    ("Tom went to the", 0.797_43),
];

#[test]
fn a_judge_with_its_own_tokenizer_reads_messages_by_its_own_chat_template() {
    let Some(case) = shared("own_template", "data/cases/A03") else {
        return;
    };
    let workplace = Workplace::new();
    let rows = judged(&workplace, &case, "chat-bos", "chatprompts.jsonl", &[]);
    assert_eq!(rows.len(), 4, "{rows:?}");
    are_judged(&rows, &OWN_TEMPLATE);
    for row in &rows {
        let messages = &row["dialogue"]["messages"];
        assert_eq!(messages[0]["role"], "user", "{row}");
    }
}

#[test]
fn the_space_between_prompt_and_completion_is_a_part_of_the_completion() {
    let Some(case) = shared("seam", "data/cases/A11") else {
        return;
    };
    let workplace = Workplace::new();
    let rows = judged(&workplace, &case, "eos-list-config", "plain.jsonl", &[]);
    // As above, of the prompt's text followed by the completion and the end token.
    let expected = [
        ("The cat sat on", 0.709_67),
        ("Once upon a time", 0.654_56),
        ("Tom went to the", 0.172_75),
        ("Lily had a red", 0.807_55),
    ];
    are_judged(&rows, &expected);
    let cat = rows.iter().find(|row| row["prompt"] == "The cat sat on");
    let cat = cat.expect("it was asked");
    assert_eq!(cat["completions"][0], " the floor.");
    let tokens = json!([" the", " f", "l", "o", "or", "."]);
    assert_eq!(cat["tokens"][0], tokens);
}

#[test]
fn a_judge_behind_a_service_reads_the_messages_too() {
    let Some(case) = shared("service_template", "data/cases/A03") else {
        return;
    };
    let workplace = Workplace::new();
    let config = config("default.toml").display().to_string();
    let judge = case.join("rw-other").display().to_string();
    let path = format!("preference.judge.path={judge:?}");
    let serve = [
        "preference",
        &config,
        "--set",
        "preference.http.listen=\"127.0.0.1:0\"",
        "--set",
        "preference.judge.kind=bradley-terry",
        "--set",
        &path,
    ];
    let mut service = workplace.start(&serve);
    let [out, _] = service.files();
    let address = service.until("its address", || {
        let words = std::fs::read_to_string(&out).ok()?;
        Some(words.split_once('\n')?.0.to_owned())
    });
    // One table instead of the keys of the configuration's judge.
    let elsewhere = format!("preference.judge={{kind = \"service\", urls = [{address:?}]}}");
    let text = std::fs::read_to_string(case.join("rm.toml")).expect("it is there");
    let folder = workplace.path("case");
    std::fs::create_dir_all(&folder).expect("a folder");
    let judge = "[preference.judge]\nkind = \"bradley-terry\"\npath = \"models/rw-other\"\n";
    assert!(text.contains(judge), "{text}");
    std::fs::write(folder.join("rm.toml"), text.replace(judge, "")).expect("it is written");
    let path = |name: &str| format!("{:?}", case.join(name).display().to_string());
    let sets = [
        format!("model.path={}", path("chat-bos")),
        format!("prompts.path={}", path("chatprompts.jsonl")),
        elsewhere,
    ];
    let run = workplace.path("judged").display().to_string();
    let config = folder.join("rm.toml").display().to_string();
    let mut call = vec!["train", &config, "--run-dir", &run];
    call.extend(sets.iter().flat_map(|set| ["--set", set.as_str()]));
    workplace.run(&call).succeeded();
    let samples = workplace.run(&["samples", &run, "--json", "--limit", "100"]);
    are_judged(&samples.succeeded().json_lines(), &OWN_TEMPLATE);
    service.terminate();
    service.wait().succeeded().without_panic();
}
