use std::fs;

use serde_json::{Value, json};

use super::*;
use crate::fixtures::{WORD_TOKENIZER, shared};

/// Loads the word tokenizer with this part replaced.
fn loaded(part: &str, value: Value) -> Result<GuardedTokenizer, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_str(WORD_TOKENIZER).unwrap();
    json[part] = value;
    fs::write(&path, json.to_string()).unwrap();
    let loaded = GuardedTokenizer::load(&path).map_err(|error| error.to_string());
    loaded.inspect_err(|error| assert!(error.contains("tokenizer.json"), "{error}"))
}

#[test]
fn a_tokenizer_that_makes_the_library_panic_is_refused() {
    let refused = loaded("pre_tokenizer", json!({"type": "FixedLength", "length": 0}));
    let refused = refused.err().unwrap();
    assert!(refused.contains("chunk size must be non-zero"), "{refused}");
}

#[test]
fn tokenizers_of_untrusted_sources_are_refused_with_their_file() {
    let Some(cases) = shared("data/cases/security/tokenizer") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    for entry in fs::read_dir(cases).unwrap() {
        let case = entry.unwrap().path();
        fs::write(&path, fs::read(&case).unwrap()).unwrap();
        let refused = GuardedTokenizer::load(&path).err();
        let refused = refused.unwrap_or_else(|| panic!("{}", case.display()));
        let refused = refused.to_string();
        assert!(
            refused.contains("tokenizer.json is not usable"),
            "{refused}"
        );
    }
}

#[test]
fn a_use_that_does_not_finish_fails_and_so_do_all_further_ones() {
    let split = json!({"type": "Split", "pattern": {"Regex": "(b+)+(?!c)"}, "behavior": "Isolated", "invert": false});
    let tokenizer = loaded("pre_tokenizer", split).unwrap();
    assert_eq!(tokenizer.deadline, Some(USE_DEADLINE));
    assert!(tokenizer.ids("cat", false).is_ok());
    let (sender, receiver) = mpsc::channel::<()>();
    let stuck = tokenizer.run_within(Duration::ZERO, move |_| {
        receiver.recv().ok();
        Ok(())
    });
    assert!(matches!(stuck, Err(Failure::Broken(_))));
    let refused = tokenizer.ids("cat", false).unwrap_err().to_string();
    assert!(refused.contains("still busy"), "{refused}");
    assert_eq!(tokenizer.decode(&[1], false), None);
    drop(sender);
}

#[test]
fn a_panic_on_a_text_is_an_error() {
    let tokenizer = loaded("pre_tokenizer", json!({"type": "Whitespace"})).unwrap();
    let failure = tokenizer.run::<()>(|_| panic!("on a text"));
    let Err(Failure::Broken(reason)) = failure else {
        panic!("it panicked");
    };
    let error = tokenizer.broken(&reason).to_string();
    assert!(
        error.contains("fails with it on a text: on a text"),
        "{error}"
    );
}
