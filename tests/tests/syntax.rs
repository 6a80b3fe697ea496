//! Shapes of the code that a formatter and clippy do not hold: parameters, sizes of structs and functions, unique names,
//! modules that do not import each other in a circle.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use syn::{
    Attribute, FnArg, ImplItemFn, Item, ItemFn, ItemImpl, ItemMod, ItemStruct, Pat, Signature,
    TraitItemFn, Type, UseTree,
    spanned::Spanned,
    visit::{self, Visit},
};
use system_tests::workspace_root;

/// Largest number of fields of a struct in a role's crate.
const MAX_FIELDS: usize = 12;
/// Crates of the roles.
const ROLES: [&str; 3] = ["actor", "preference", "learner"];
/// Type names that stand in several files: by convention, or as the same idea in private modules.
const SHARED_NAMES: [&str; 6] = [
    "Arguments",  // of a command
    "Engine",     // mistral.rs, and its stub
    "Upstream",   // of a stream in memory and over NATS
    "Downstream", // the same
    "StoredBlob", // in memory and over NATS
    "Apply",      // a filter, as a function
];

/// Modules at the root of a crate that import each other, with the reason.
const CIRCLES: [(&str, &[&str], &str); 6] = [
    (
        "agon",
        &["cluster", "run"],
        "a run in one process shows its state as one in many does, and both are built of the same roles",
    ),
    (
        "jinja",
        &[
            "arguments",
            "filters",
            "format",
            "functions",
            "json",
            "loops",
            "methods",
            "operators",
            "render",
            "repr",
            "scope",
            "value",
        ],
        "values of a template are also its functions, macros and loops",
    ),
    (
        "model",
        &[
            "chat",
            "config",
            "decode",
            "encoder",
            "folder",
            "gguf",
            "input_file",
            "logprobs",
            "lora",
            "ragged",
            "reward",
            "rope",
            "sampling",
            "shards",
            "special_tokens",
            "stop_tokens",
            "tokenizer",
            "transformer",
            "weights",
        ],
        "a model with its adapter, reward head and sampler is one thing in several files",
    ),
    (
        "preference",
        &["judge", "judge_thread", "pool"],
        "a judge asks for comparisons of the pool's form, and the pool runs judges",
    ),
    (
        "settings",
        &[
            "actor",
            "apo",
            "checks",
            "evaluation",
            "fit",
            "ganpo",
            "judge",
            "learner",
            "lora",
            "model",
            "objective",
            "optimizer",
            "pairs",
            "playground",
            "preference",
            "prompts",
            "reference",
            "run",
            "settings",
            "sft",
            "source",
            "telemetry",
            "transport",
            "url",
        ],
        "the checks of a section read other sections",
    ),
    (
        "transport",
        &["delivery", "memory", "nats", "run_key", "stream"],
        "a stream is one of memory or of NATS, chosen by an enum",
    ),
];

/// A production source file.
struct Source {
    /// Path relative to the workspace.
    path: String,
    syntax: syn::File,
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    for entry in entries {
        let path = entry.expect("an entry of a folder").path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Every file of the crates' `src`, without files that hold tests alone.
fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    rust_files(&workspace_root().join("crates"), &mut paths);
    paths.sort();
    let is_test = |path: &Path| {
        let name = path
            .file_stem()
            .and_then(|n| n.to_str())
            .unwrap_or_default();
        let in_src = path.components().any(|c| c.as_os_str() == "src");
        let tests = ["tests", "fixtures", "fake", "finite_difference"];
        !in_src
            || path.ends_with("kernels/src/check.rs")
            || tests.contains(&name)
            || name.ends_with("_parity")
            || name.starts_with("against_")
    };
    let files: Vec<Source> = paths
        .into_iter()
        .filter(|path| !is_test(path))
        .map(|path| {
            let text = fs::read_to_string(&path).expect("a source file");
            let syntax = syn::parse_file(&text);
            let syntax = syntax.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let path = path
                .strip_prefix(workspace_root())
                .expect("in the workspace");
            let path = path.display().to_string();
            Source { path, syntax }
        })
        .collect();
    assert!(files.len() > 250, "only {} files", files.len());
    files
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let is_test = attribute.path().is_ident("test");
        let cfg = attribute.path().is_ident("cfg") && {
            let tokens = attribute.meta.require_list().map(|l| l.tokens.to_string());
            tokens.is_ok_and(|t| t == "test")
        };
        is_test || cfg
    })
}

/// Whether a struct is a row of a file or a message, whose keys are its fields: it derives `Serialize`.
fn is_record(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let tokens = attribute.meta.require_list().map(|l| l.tokens.to_string());
        attribute.path().is_ident("derive") && tokens.is_ok_and(|t| t.contains("Serialize"))
    })
}

/// What is collected from one file.
#[derive(Default)]
struct Shapes {
    in_trait_impl: bool,
    /// Functions with a tuple for a parameter.
    tuples: Vec<String>,
    /// Lines of every function.
    lengths: Vec<(usize, String)>,
    /// Fields of every struct.
    fields: Vec<(usize, String)>,
    /// Type names.
    names: Vec<String>,
    /// Modules at the crate's root that are imported or named.
    imports: BTreeSet<String>,
    /// Modules in other files that are for tests.
    test_modules: Vec<String>,
}

fn is_tuple(argument: &FnArg) -> bool {
    let FnArg::Typed(typed) = argument else {
        return false;
    };
    let mut inner = &*typed.ty;
    while let Type::Reference(reference) = inner {
        inner = &reference.elem;
    }
    let by_type = matches!(inner, Type::Tuple(tuple) if !tuple.elems.is_empty());
    by_type || matches!(&*typed.pat, Pat::Tuple(_))
}

/// First names of all paths in a tree of imports.
fn first_names(tree: &UseTree) -> Vec<String> {
    match tree {
        UseTree::Path(path) => vec![path.ident.to_string()],
        UseTree::Name(name) => vec![name.ident.to_string()],
        UseTree::Group(group) => group.items.iter().flat_map(first_names).collect(),
        UseTree::Rename(_) | UseTree::Glob(_) => Vec::new(),
    }
}

impl Shapes {
    fn function(&mut self, signature: &Signature, whole: proc_macro2::Span) {
        let name = signature.ident.to_string();
        if !self.in_trait_impl && signature.inputs.iter().any(is_tuple) {
            self.tuples.push(name.clone());
        }
        let lines = whole.end().line - signature.span().start().line + 1;
        self.lengths.push((lines, name));
    }
}

impl<'ast> Visit<'ast> for Shapes {
    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        if !is_for_tests(&module.attrs) {
            visit::visit_item_mod(self, module);
        } else if module.content.is_none() {
            self.test_modules.push(module.ident.to_string());
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if let UseTree::Path(path) = &item.tree
            && path.ident == "crate"
        {
            self.imports.extend(first_names(&path.tree));
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let mut names = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string());
        if names.next().is_some_and(|name| name == "crate") {
            self.imports.extend(names.next());
        }
        visit::visit_path(self, path);
    }

    fn visit_item(&mut self, item: &'ast Item) {
        match item {
            Item::Enum(e) => self.names.push(e.ident.to_string()),
            Item::Trait(t) => self.names.push(t.ident.to_string()),
            Item::Type(t) => self.names.push(t.ident.to_string()),
            _ => {}
        }
        visit::visit_item(self, item);
    }

    fn visit_item_struct(&mut self, item: &'ast ItemStruct) {
        self.names.push(item.ident.to_string());
        if !is_record(&item.attrs) {
            let name = item.ident.to_string();
            self.fields.push((item.fields.len(), name));
        }
    }

    fn visit_item_impl(&mut self, item: &'ast ItemImpl) {
        let before = std::mem::replace(&mut self.in_trait_impl, item.trait_.is_some());
        visit::visit_item_impl(self, item);
        self.in_trait_impl = before;
    }

    fn visit_item_fn(&mut self, item: &'ast ItemFn) {
        if !is_for_tests(&item.attrs) {
            self.function(&item.sig, item.span());
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast ImplItemFn) {
        if !is_for_tests(&item.attrs) {
            self.function(&item.sig, item.span());
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_trait_item_fn(&mut self, item: &'ast TraitItemFn) {
        self.function(&item.sig, item.span());
        visit::visit_trait_item_fn(self, item);
    }
}

fn shapes() -> Vec<(String, Shapes)> {
    sources()
        .into_iter()
        .map(|source| {
            let mut shapes = Shapes::default();
            shapes.visit_file(&source.syntax);
            (source.path, shapes)
        })
        .collect()
}

#[test]
fn no_parameter_is_a_tuple() {
    let found: Vec<String> = shapes()
        .into_iter()
        .flat_map(|(path, shapes)| {
            let named = shapes.tuples.into_iter();
            named.map(move |name| format!("{path}: {name}"))
        })
        .collect();
    assert!(
        found.is_empty(),
        "{} functions:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn structs_of_the_roles_have_a_dozen_fields_at_most() {
    let mut found = Vec::new();
    for (path, shapes) in shapes() {
        if !ROLES
            .iter()
            .any(|role| path.starts_with(&format!("crates/{role}/")))
        {
            continue;
        }
        let large = shapes
            .fields
            .into_iter()
            .filter(|(count, _)| *count > MAX_FIELDS);
        found.extend(large.map(|(count, name)| format!("{path}: {name} has {count} fields")));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn functions_are_short() {
    let mut lengths: Vec<(usize, String)> = Vec::new();
    for (path, shapes) in shapes() {
        let named = shapes.lengths.into_iter();
        lengths.extend(named.map(|(lines, name)| (lines, format!("{path}: {name}"))));
    }
    lengths.sort();
    let (count, longest) = (lengths.len(), lengths.last().expect("there are functions"));
    let (median, p99) = (lengths[count / 2].0, lengths[count * 99 / 100].0);
    eprintln!("{count} functions: median {median} lines, p99 {p99}, longest {longest:?}");
    assert!(median <= 8, "the median function has {median} lines");
    let above: Vec<_> = lengths.iter().filter(|(lines, _)| *lines > 47).collect();
    assert!(
        p99 <= 47,
        "one function in a hundred has {p99} lines or more: {above:#?}"
    );
    assert!(longest.0 <= 80, "{longest:?}");
}

#[test]
fn a_type_name_stands_for_one_thing() {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (path, shapes) in shapes() {
        for name in shapes.names {
            places.entry(name).or_default().push(path.clone());
        }
    }
    let twice: Vec<String> = places
        .into_iter()
        .filter(|(name, paths)| paths.len() > 1 && !SHARED_NAMES.contains(&name.as_str()))
        .map(|(name, paths)| format!("{name}: {}", paths.join(", ")))
        .collect();
    assert!(
        twice.is_empty(),
        "{} names:\n{}",
        twice.len(),
        twice.join("\n")
    );
}

#[test]
fn every_classified_error_has_its_exit_code() {
    let path = workspace_root().join("crates/agon/src/exit_code.rs");
    let exit_code = fs::read_to_string(path).expect("a source file");
    let mut count = 0;
    for source in sources() {
        for item in &source.syntax.items {
            let Item::Impl(item) = item else { continue };
            let Some((_, path, _)) = &item.trait_ else {
                continue;
            };
            let Type::Path(name) = &*item.self_ty else {
                continue;
            };
            if path
                .segments
                .last()
                .is_some_and(|s| s.ident == "Classified")
            {
                let name = &name.path.segments.last().expect("a type").ident;
                count += 1;
                let row = format!("class_of::<{name}>");
                assert!(
                    exit_code.contains(&row),
                    "no {row} in agon/src/exit_code.rs"
                );
            }
        }
    }
    assert!(count > 10, "only {count} classified errors");
}

/// Imports of every module at the root of every crate, tests aside: crate, module, imported modules.
fn imports() -> BTreeMap<String, BTreeMap<String, BTreeSet<String>>> {
    let shapes = shapes();
    let is_test = |path: &str| {
        let (folder, file) = path.rsplit_once('/').unwrap_or_default();
        let name = file.trim_end_matches(".rs").to_owned();
        let declares = |(parent, shapes): &(String, Shapes)| {
            parent == &format!("{folder}/mod.rs") && shapes.test_modules.contains(&name)
        };
        shapes.iter().any(declares)
    };
    let mut imports: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for (path, shapes) in &shapes {
        let parts: Vec<&str> = path.splitn(5, '/').collect();
        let ["crates", name, "src", module, ..] = parts[..] else {
            continue;
        };
        let module = module.trim_end_matches(".rs");
        if !is_test(path) && !["lib", "main"].contains(&module) {
            let of_module = imports.entry(name.to_owned()).or_default();
            let of_module = of_module.entry(module.to_owned()).or_default();
            of_module.extend(
                shapes
                    .imports
                    .iter()
                    .filter(|import| *import != module)
                    .cloned(),
            );
        }
    }
    imports
}

/// Modules that `from` imports, directly or not.
fn reachable(imports: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let (mut found, mut open) = (BTreeSet::new(), vec![from.to_owned()]);
    while let Some(module) = open.pop() {
        for import in imports.get(&module).into_iter().flatten() {
            if found.insert(import.clone()) {
                open.push(import.clone());
            }
        }
    }
    found
}

#[test]
fn modules_at_the_root_of_a_crate_do_not_import_each_other_in_a_circle() {
    let mut circles: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, imports) in imports() {
        let in_circle = |module: &&String| reachable(&imports, module).contains(*module);
        let modules: Vec<String> = imports.keys().filter(in_circle).cloned().collect();
        if !modules.is_empty() {
            circles.insert(name, modules);
        }
    }
    let known = CIRCLES.iter().map(|(name, modules, reason)| {
        assert!(!reason.is_empty(), "{name}");
        (
            (*name).to_owned(),
            modules.iter().map(ToString::to_string).collect(),
        )
    });
    assert_eq!(
        circles,
        known.collect(),
        "a module in a circle: move what both need to a third"
    );
}
