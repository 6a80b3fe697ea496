//! Panics of libraries on input that they did not expect, returned as errors. Independent of which library it is.

use std::{
    any::Any,
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

thread_local! {
    /// Whether this thread runs a library's code under [`guarded`].
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a library's code; a panic in it becomes its message and is not reported otherwise. What the code borrows
/// mutably must not be used after a panic.
///
/// # Errors
/// When it panics.
pub fn guarded<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    silence_guarded_panics();
    let outer = IS_GUARDED.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(run));
    IS_GUARDED.set(outer);
    result.map_err(|payload| message(payload.as_ref()))
}

/// Keeps panics under [`guarded`] from the panic hook, which would print them.
fn silence_guarded_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !IS_GUARDED.get() {
                hook(info);
            }
        }));
    });
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("it panicked").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(guarded(|| 1), Ok(1));
        let none: Vec<u32> = Vec::new();
        let error = guarded(|| none[usize::from(none.is_empty())]).unwrap_err();
        assert!(error.contains("index out of bounds"), "{error}");
        let nested = guarded(|| guarded(|| panic!("inner")).unwrap_err());
        assert_eq!(nested.as_deref(), Ok("inner"));
        assert!(!IS_GUARDED.get());
    }
}
