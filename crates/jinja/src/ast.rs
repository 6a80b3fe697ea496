//! A template as a tree.

use std::sync::Arc;

/// A value that is written in the template.
#[derive(Debug, Clone)]
pub(crate) enum Literal {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comparison {
    Equal,
    Unequal,
    Less,
    AtMost,
    Greater,
    AtLeast,
    In,
    NotIn,
}

/// The parts of `[start:stop:step]`.
#[derive(Debug)]
pub(crate) struct Slice {
    pub(crate) start: Option<Expression>,
    pub(crate) stop: Option<Expression>,
    pub(crate) step: Option<Expression>,
}

#[derive(Debug)]
pub(crate) enum Expression {
    Literal(Literal),
    Name(String),
    Attribute(Box<Expression>, String),
    Item(Box<Expression>, Box<Expression>),
    Slice(Box<Expression>, Box<Slice>),
    List(Vec<Expression>),
    Tuple(Vec<Expression>),
    Dict(Vec<(Expression, Expression)>),
    Negative(Box<Expression>),
    Positive(Box<Expression>),
    Not(Box<Expression>),
    And(Box<Expression>, Box<Expression>),
    Or(Box<Expression>, Box<Expression>),
    Arithmetic(Arithmetic, Box<Expression>, Box<Expression>),
    Concatenation(Vec<Expression>),
    Comparison(Box<Expression>, Vec<(Comparison, Expression)>),
    Conditional(Box<Conditional>),
    Call(Box<Expression>, Box<Arguments>),
    Filter(Box<Expression>, Box<Filter>),
    Test(Box<Expression>, Box<Filter>),
}

/// `then if test else otherwise`.
#[derive(Debug)]
pub(crate) struct Conditional {
    pub(crate) test: Expression,
    pub(crate) then: Expression,
    pub(crate) otherwise: Option<Expression>,
}

/// The arguments of a call.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    pub(crate) positional: Vec<Expression>,
    pub(crate) named: Vec<(String, Expression)>,
    /// `*expression`.
    pub(crate) more: Option<Expression>,
    /// `**expression`.
    pub(crate) more_named: Option<Expression>,
}

/// A filter or a test, with the arguments after the value that it is applied to.
#[derive(Debug)]
pub(crate) struct Filter {
    pub(crate) name: String,
    pub(crate) arguments: Arguments,
}

/// What can be assigned to.
#[derive(Debug)]
pub(crate) enum Target {
    Name(String),
    /// An attribute of a namespace.
    Attribute(String, String),
    Tuple(Vec<Target>),
}

/// A statement and its line.
#[derive(Debug)]
pub(crate) struct Statement {
    pub(crate) line: usize,
    pub(crate) kind: StatementKind,
}

#[derive(Debug)]
pub(crate) enum StatementKind {
    Text(String),
    Print(Expression),
    For(Arc<For>),
    If(If),
    Set(Target, Expression),
    SetBlock {
        target: Target,
        filters: Vec<Filter>,
        body: Vec<Statement>,
    },
    With {
        variables: Vec<(Target, Expression)>,
        body: Vec<Statement>,
    },
    Macro(Arc<Macro>),
    CallBlock {
        callee: Expression,
        arguments: Arguments,
        caller: Arc<Macro>,
    },
    FilterBlock {
        filters: Vec<Filter>,
        body: Vec<Statement>,
    },
    /// Transformers' `generation`: a scope that prints its body.
    Generation(Vec<Statement>),
    Break,
    Continue,
}

#[derive(Debug)]
pub(crate) struct If {
    /// Tests and what they guard, in their order.
    pub(crate) branches: Vec<(Expression, Vec<Statement>)>,
    pub(crate) otherwise: Vec<Statement>,
}

#[derive(Debug)]
pub(crate) struct For {
    pub(crate) target: Target,
    pub(crate) items: Expression,
    pub(crate) filter: Option<Expression>,
    pub(crate) is_recursive: bool,
    pub(crate) body: Vec<Statement>,
    pub(crate) otherwise: Vec<Statement>,
}

#[derive(Debug)]
pub(crate) struct Macro {
    pub(crate) name: String,
    /// The last ones may have defaults.
    pub(crate) parameters: Vec<(String, Option<Expression>)>,
    pub(crate) body: Vec<Statement>,
    /// Which of `caller`, `kwargs` and `varargs` the body names: without it they are not taken.
    pub(crate) takes: Takes,
}

/// The special variables that a macro's body names.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Takes {
    pub(crate) caller: bool,
    pub(crate) kwargs: bool,
    pub(crate) varargs: bool,
}
