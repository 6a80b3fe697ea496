//! `agon preference`: the real program as a judge for others, over HTTP.

use house::{Running, Workplace, config, http, tiny_bandit};
use playground::{Vocabulary, train_post};
use serde_json::{Value, json};

const LISTEN: &str = "preference.http.listen=\"127.0.0.1:0\"";

/// `agon preference` with these further settings, and where it listens.
fn serve(workplace: &Workplace, sets: &[&str]) -> (Running, String) {
    let path = config("default.toml").display().to_string();
    let mut arguments = vec!["preference", &path, "--set", LISTEN];
    arguments.extend(sets.iter().flat_map(|set| ["--set", *set]));
    let mut running = workplace.start(&arguments);
    let [out, _] = running.files();
    let address = running.until("its address", || {
        let words = std::fs::read_to_string(&out).ok()?;
        Some(words.split_once('\n')?.0.to_owned())
    });
    (running, address)
}

/// Asks about these comparisons.
fn ask(base: &str, pairs: &Value) -> (u16, Value) {
    let body = json!({"pairs": pairs}).to_string();
    http(base, "POST", "/v1/preferences", &body)
}

fn p(result: &Value) -> f64 {
    let p = result["p"].as_f64();
    p.unwrap_or_else(|| panic!("no p in {result}"))
}

#[test]
fn the_playgrounds_judge_answers_others_and_leaves_when_it_is_asked_to() {
    let workplace = Workplace::new();
    let (running, base) = serve(&workplace, &[]);
    let post = train_post(0, 1);
    let golden = post.golden(2);
    let golden = Vocabulary::shared().text(&golden[..golden.len() - 1]);
    let pair = |first: &str, second: &str| json!({"prompt": post.text(), "first": first, "second": second});
    let pairs = json!([
        pair(&golden, "the dog likes the dog"),
        pair("the dog likes the dog", &golden),
        pair(&golden, &golden),
    ]);
    let (status, answer) = ask(&base, &pairs);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["judge"], "gold");
    let [better, worse, same] = [0, 1, 2].map(|i| p(&answer["results"][i]));
    assert!(better > 0.9, "{answer}");
    assert!((better + worse - 1.0).abs() < 1e-6, "{answer}");
    assert!((same - 0.5).abs() < 1e-6, "{answer}");
    assert_eq!(http(&base, "GET", "/healthz", "").0, 200);
    assert_eq!(http(&base, "GET", "/readyz", "").0, 200);
    running.terminate();
    running.wait().succeeded().without_panic();
}

#[test]
fn what_cannot_be_answered_is_refused_and_the_service_goes_on() {
    let workplace = Workplace::new();
    let (running, base) = serve(&workplace, &["preference.http.max_pairs=2"]);
    let post = train_post(0, 1).text();
    let pair = json!({"prompt": post, "first": "the dog", "second": "my dog"});
    let with = |key: &str, value: Value| {
        let mut pair = pair.clone();
        pair[key] = value;
        json!({"pairs": [pair]}).to_string()
    };
    for (body, status, says) in [
        ("{".to_owned(), 400, "EOF"),
        (r#"{"pears": []}"#.to_owned(), 422, "pears"),
        (with("first", "".into()), 422, "pairs[0].first: it is empty"),
        (
            with("first", "a xylophone".into()),
            422,
            "\"xylophone\" is not one",
        ),
        (
            with("prompt", json!([{"role": "user", "content": "hi"}])),
            422,
            "pairs[0].prompt",
        ),
        (with("third", "".into()), 422, "pairs[0].third"),
        (
            json!({"pairs": vec![&pair; 3]}).to_string(),
            422,
            "preference.http.max_pairs = 2",
        ),
    ] {
        let (seen, answer) = http(&base, "POST", "/v1/preferences", &body);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert_eq!(seen, status, "{body}: {answer}");
        assert!(message.contains(says), "{body}: {message}");
    }
    let unread = with("prompt", "the dog".into());
    let (status, answer) = http(&base, "POST", "/v1/preferences", &unread);
    assert_eq!(status, 200, "{answer}");
    assert!(answer["results"][0]["abstained"].is_string(), "{answer}");
    running.terminate();
    running.wait().succeeded().without_panic();
}

#[test]
fn one_service_is_the_judge_of_another() {
    let workplace = Workplace::new();
    let (first, base) = serve(&workplace, &[]);
    let urls = format!("preference.judge.urls=[{base:?}]");
    let (second, elsewhere) = serve(&workplace, &["preference.judge.kind=service", &urls]);
    let post = train_post(0, 4);
    let golden = post.golden(2);
    let text = Vocabulary::shared().text(&golden[..golden.len() - 1]);
    let pair = json!({
        "prompt": post.text(),
        "first": text,
        "second": "the dog likes the dog",
        "prompt_ids": post.prompt_ids(),
        "first_ids": golden,
        "second_ids": [1, 2],
    });
    let (status, answer) = ask(&elsewhere, &json!([pair]));
    assert_eq!(
        (status, &answer["judge"]),
        (200, &"service".into()),
        "{answer}"
    );
    assert!(p(&answer["results"][0]) > 0.9, "{answer}");
    assert_eq!(answer["results"][0]["version"], 1, "the gold judge's");
    for running in [second, first] {
        running.terminate();
        running.wait().succeeded().without_panic();
    }
}

#[test]
fn it_says_what_it_lacks() {
    let workplace = Workplace::new();
    let path = config("default.toml").display().to_string();
    workplace
        .run(&["preference", &path])
        .check(2, &["preference.http.listen is empty"]);
    let taken = "preference.http.listen=\"256.0.0.1:80\"";
    workplace
        .run(&["preference", &path, "--set", taken])
        .check(3, &["256.0.0.1:80"]);
    let key = "preference.http.token_path=\"nowhere\"";
    workplace
        .run(&["preference", &path, "--set", LISTEN, "--set", key])
        .check(3, &["nowhere"]);
}

#[test]
fn a_run_serves_its_judge_beside_its_streams() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let mut running = workplace.start(&tiny_bandit(&run, &[LISTEN, "learner.steps=100000"]));
    let told = "preference service listens address=";
    let base = running.until("the address of the service", {
        let [_, err] = running.files();
        move || {
            let words = std::fs::read_to_string(&err).ok()?;
            let (_, rest) = words.split_once(told)?;
            let (address, _) = rest.split_once('\n')?;
            Some(format!("http://{}", address.trim().trim_matches('"')))
        }
    });
    let arms = json!([
        {
            "prompt": "which arm?", "first": "x", "second": "y",
            "prompt_ids": [0], "first_ids": [0], "second_ids": [1],
        },
    ]);
    let (status, answer) = ask(&base, &arms);
    assert_eq!(
        (status, &answer["judge"]),
        (200, &"matrix".into()),
        "{answer}"
    );
    let p = p(&answer["results"][0]);
    assert!((p - 0.8).abs() < 1e-6, "the matrix says so: {answer}");
    running.terminate();
    running.wait().check(5, &[]).without_panic();
}
