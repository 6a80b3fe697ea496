//! The vocabulary of `docs/glossary.md`: words that were retired stay out of code, documents and configurations.

use std::{fs, path::Path, process::Command};

use system_tests::workspace_root;

/// Retired words and what to say instead. A word matches as a whole, in any case.
const RETIRED: [(&str, &str); 56] = [
    ("house", "workspace, process group"),
    ("usher", "dispatcher"),
    ("shelf", "weight store"),
    ("station", "stage"),
    ("stations", "stages"),
    ("whoever", "the role, the caller, the client"),
    ("in hand", "in flight, buffered"),
    ("in_hand", "in_flight"),
    ("is told", "receives, is notified"),
    ("are told", "receive, are notified"),
    ("so many", "the number of"),
    ("laid down", "uploaded, stored"),
    ("lay down", "upload, store"),
    ("lays down", "uploads, stores"),
    ("lie across", "are transposed"),
    ("lies across", "is transposed"),
    ("sign of life", "heartbeat"),
    ("signs of life", "heartbeats"),
    ("coarse numbers", "reduced precision"),
    ("coarser numbers", "reduced precision"),
    ("numbers of the weights", "dtype of the weights"),
    ("number format", "dtype"),
    ("befall", "happen to"),
    ("befalls", "happens to"),
    ("outlook", "progress line"),
    ("at the door", "waiting for admission"),
    ("the bench", "the judge pool"),
    ("the game is played", "the round runs"),
    ("who asks", "the client"),
    ("who waits", "the waiting task"),
    ("writer of completions", "sampler"),
    ("owns up", "reports"),
    ("seat", "slot"),
    ("seats", "slots"),
    ("seated", "in a slot"),
    ("sitting", "session"),
    ("door", "stage, admission"),
    ("ruling", "label"),
    ("contest", "comparison"),
    ("player", "policy"),
    ("intake", "pair source"),
    ("succession", "checkpoint branch"),
    ("top_up", "refill"),
    ("obey", "follow"),
    ("coarse", "reduced precision"),
    ("lookout", "monitor"),
    ("teller", "reporter"),
    ("bury", "dead-letter"),
    ("stranded", "orphaned"),
    ("trunk", "backbone"),
    ("habits", "settings"),
    ("pump", "forward"),
    ("ledger", "counters"),
    ("brought near", "prefetched"),
    ("turned over", "transposed"),
    ("must_gather", "needs_gather"),
];

/// Files in which a retired word means something else, such as the playground's vocabulary.
const ELSEWHERE: [(&str, &[&str]); 1] = [("station", &["crates/playground/"])];

/// Document whose tables name what was renamed.
const RENAMES: &str = "docs/decisions.md";

/// Text files of the repository that git tracks or would track.
fn files() -> Vec<String> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(workspace_root())
        .output()
        .expect("git lists the files");
    let listed = String::from_utf8(listed.stdout).expect("paths are UTF-8");
    let text = ["rs", "md", "toml", "yml", "json", "js", "html", "css", "sh"];
    let has_text = |file: &&str| {
        let extension = Path::new(file).extension().and_then(|e| e.to_str());
        extension.is_some_and(|e| text.contains(&e)) || file.starts_with(".ci/")
    };
    let own = |file: &&str| !file.ends_with("tests/language.rs") && !file.ends_with("Cargo.lock");
    listed
        .lines()
        .filter(has_text)
        .filter(own)
        .map(str::to_owned)
        .collect()
}

/// A line in lower case, in which the words of a `CamelCase` name are apart.
fn separated(line: &str) -> String {
    let mut words = String::with_capacity(line.len());
    let mut follows_lower = false;
    for c in line.chars() {
        if c.is_uppercase() && follows_lower {
            words.push(' ');
        }
        follows_lower = c.is_lowercase();
        words.extend(c.to_lowercase());
    }
    words
}

/// Whether `text`, in lower case, has `word` as a whole word or part of an identifier.
fn has_word(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        let is_end = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric());
        is_end(before) && is_end(after)
    })
}

#[test]
fn retired_words_stay_out() {
    let mut found = Vec::new();
    let files = files();
    assert!(files.len() > 300, "only {} files are listed", files.len());
    for file in files {
        let Ok(text) = fs::read_to_string(workspace_root().join(&file)) else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            if file == RENAMES && line.starts_with("| ") {
                continue;
            }
            let line = separated(line);
            for (word, instead) in RETIRED {
                let may = ELSEWHERE
                    .iter()
                    .any(|(w, paths)| *w == word && paths.iter().any(|p| file.starts_with(p)));
                if !may && has_word(&line, word) {
                    found.push(format!("{file}:{}: {word:?}; say: {instead}", number + 1));
                }
            }
        }
    }
    assert!(
        found.is_empty(),
        "{} places:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn a_word_is_found_in_identifiers_and_not_within_words() {
    assert!(has_word("the house.", "house"));
    assert!(has_word("let weights_shelf = 1;", "shelf"));
    for (name, word) in [
        ("struct WeightsShelf;", "shelf"),
        ("UsherQueue::new()", "usher"),
        ("fn f(hand: InHand)", "in hand"),
    ] {
        assert!(has_word(&separated(name), word), "{name}");
    }
    assert!(!has_word("houses and shelfware", "shelf"));
}
